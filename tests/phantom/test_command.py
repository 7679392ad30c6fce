import subprocess
import sys

import pytest


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
    ],
)
def test_the_command_writes_each_layout(tmp_path, layout, expected):
    result = run(layout, tmp_path / "out", "-n", 1, "--n_test", 1, "--voxel_mm", 8, "--clean")
    assert result.returncode == 0, result.stderr
    assert f"Synthetic data set in {tmp_path / 'out'}" in result.stdout
    assert list((tmp_path / "out").glob(expected))


def test_a_folder_with_content_is_refused_in_one_line(tmp_path):
    (tmp_path / "mine.txt").touch()
    result = run("fomo", tmp_path)
    assert result.returncode == 1
    assert result.stderr == f"error: {tmp_path} is not empty: name a new folder for the synthetic data set.\n"
