import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from nnunet_ssl.phantom import __main__ as phantom
from nnunet_ssl.phantom import layouts


def run(*arguments):
    command = [sys.executable, "-m", "nnunet_ssl.phantom", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("fomo", "PT001_OASIS1/sub_1/ses_1/*.nii.gz"),
        ("fomo-a", "sub_1/ses_1/*.nii.gz"),
        ("atlas", "Training/R001/sub-r001s001/ses-1/anat/*_T1w.nii.gz"),
        ("atlas3", "R001/sub-r001s001/ses-1/anat/*_space-orig_desc-brain_T1w.nii.gz"),
        ("isles", "sub-strokecase0001/ses-0001/dwi/*_dwi.nii.gz"),
        ("fcd", "sub-00001/anat/*_FLAIR.nii.gz"),
        ("tissue", "imagesTr/phantom_001_0000.nii.gz"),
    ],
)
def test_the_command_writes_each_layout(tmp_path, layout, expected):
    out = tmp_path / "Dataset510_Out"
    result = run(layout, out, "-n", 1, "--n_test", 1, "--voxel_mm", 8, "--clean")
    assert result.returncode == 0, result.stderr
    assert f"Synthetic data set in {out}" in result.stdout
    assert list(out.glob(expected))


def test_a_folder_with_content_is_refused_in_one_line(tmp_path):
    (tmp_path / "mine.txt").touch()
    result = run("fomo", tmp_path)
    assert result.returncode == 1
    assert result.stderr == f"error: {tmp_path} is not empty: name a new folder for the synthetic data set.\n"


@pytest.mark.parametrize("name", ["out", "."])
def test_a_file_is_no_folder_to_write_to(tmp_path, monkeypatch, name):
    path = tmp_path / "out"
    path.write_bytes(b"mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="Not a directory" if name == "out" else "is not empty"):
        call(monkeypatch, "isles", name, "-n", 1, "--voxel_mm", 8)
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("out", [".", "link", "../Dataset510_Out/"])
def test_a_folder_that_is_there_is_filled_and_not_replaced(tmp_path, monkeypatch, out):
    """As the current folder, a link to another disk, or where a disk is mounted, which cannot be replaced."""
    folder = tmp_path / "Dataset510_Out"
    folder.mkdir()
    identity = folder.stat().st_ino
    monkeypatch.chdir(folder)
    if out == "link":
        out = tmp_path / "Dataset511_Link"
        out.symlink_to(folder)
    (folder / f".unfinished.{Path(out).name or folder.name}").mkdir()  # of a try that was interrupted
    call(monkeypatch, "tissue", out, "-n", 1, "--n_test", 0, "--voxel_mm", 8)
    assert folder.stat().st_ino == identity
    assert {path.name for path in folder.iterdir()} == {"dataset.json", "imagesTr", "labelsTr"}


@pytest.mark.parametrize("layout", phantom.PARTICULAR["truth"])
def test_the_truth_may_lie_beside_the_data_in_one_folder(tmp_path, monkeypatch, layout):
    out = tmp_path / "out"
    call(monkeypatch, layout, out, "-n", 1, "--voxel_mm", 8, "--truth", out / "truth")
    assert list((out / "truth").glob("*.nii.gz"))
    assert len(list(out.iterdir())) > 1
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["phantom", *map(str, arguments)])
    phantom.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["atlas", "--rater", "t1"], "atlas has no --rater, which is for isles, fcd"),
        (["fomo", "--truth", "t"], "fomo has no --truth, which is for atlas, isles, fcd"),
        (["isles", "--labels", "regions"], "isles has no --labels, which is for tissue"),
        (["isles", "--rater", "t1"], "isles has no scans of t1; it has dwi, adc, flair"),
        (["fcd", "--rater", "dwi"], "fcd has no scans of dwi; it has flair, t1"),
        (["tissue", "--modalities", "t1", "ct"], "tissue has no scans of ct; it has t1"),
        (["isles", "--contrast_to_noise", "4"], "nobody was named: add --rater"),
        (["isles", "--rater", "dwi", "--contrast_to_noise", "-1"], "--contrast_to_noise -1 is no number from 0"),
        (["isles", "--rater", "dwi", "--contrast_to_noise", "nan"], "--contrast_to_noise nan is no number from 0"),
        (["isles", "--seed", "-1"], "2"),
    ],
)
def test_an_option_that_a_layout_does_not_know_is_refused(tmp_path, monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=message):
        call(monkeypatch, arguments[0], tmp_path / "out", *arguments[1:])
    assert not (tmp_path / "out").exists()


def test_raters_and_truth_by_the_command(tmp_path, monkeypatch):
    common = ["-n", 2, "--voxel_mm", 8]
    call(monkeypatch, "isles", tmp_path / "out", "--rater", "flair", "--truth", tmp_path / "truth", *common)
    assert sorted(path.name for path in (tmp_path / "truth").iterdir()) == [
        f"sub-strokecase000{number}_ses-0001.nii.gz" for number in (1, 2)
    ]


def test_a_corpus_of_given_modalities_has_them_in_every_session_and_groups_that_only_the_brain_tells(
    tmp_path, monkeypatch
):
    call(monkeypatch, "fomo", tmp_path / "out", "-n", 4, "--voxel_mm", 8, "--clean", "--modalities", "t1", "flair")
    people = pd.read_csv(tmp_path / "out" / "participants.tsv", sep="\t")
    assert people.groupby("participant_id")["group"].first().tolist() == ["control", "stroke"] * 2
    assert set(people["dataset"]) == {"PT001_PHANTOM"}
    for session in (tmp_path / "out").glob("PT001_PHANTOM/sub_*/ses_*"):
        assert sorted(path.name for path in session.iterdir()) == ["flair.nii.gz", "t1.nii.gz"]


def test_an_interrupted_call_leaves_no_data_set_and_the_next_one_begins_anew(tmp_path, monkeypatch):
    out, write = tmp_path / "Dataset510_Out", layouts.tissue.write_nifti

    def interrupted(path, *arguments, **options):
        if "labels" in path.parent.name:
            raise KeyboardInterrupt
        write(path, *arguments, **options)

    monkeypatch.setattr(layouts.tissue, "write_nifti", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        call(monkeypatch, "tissue", out, "-n", 1, "--n_test", 0, "--voxel_mm", 8)
    assert not out.exists()
    monkeypatch.setattr(layouts.tissue, "write_nifti", write)
    call(monkeypatch, "tissue", out, "-n", 1, "--n_test", 0, "--voxel_mm", 8)
    assert {path.name for path in tmp_path.iterdir()} == {out.name}
    assert len(list(out.rglob("*.nii.gz"))) == 2
