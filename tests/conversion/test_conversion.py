"""What the three scripts share, tried with the cheapest of them."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from nnunet_ssl.conversion.dataset import Case, Target, _refuse_foreign_files
from nnunet_ssl.errors import UserError

SHAPE = (16, 18, 14)


def write_training(tools, root, count, *, first=1):
    for number in range(first, first + count):
        anat = root / "Training" / "R001" / f"sub-r001s{number:03d}" / "ses-1" / "anat"
        rng = np.random.default_rng(number)
        stem = f"sub-r001s{number:03d}_ses-1_space-MNI152NLin2009aSym"
        tools.write_nifti(anat / f"{stem}_T1w.nii.gz", rng.random(SHAPE).astype(np.float32) * 20)
        mask = (rng.random(SHAPE) > 0.97).astype(np.uint8)
        tools.write_nifti(anat / f"{stem}_label-L_desc-T1lesion_mask.nii.gz", mask)
    return root


def dataset(env, name="Dataset501_ATLASv2"):
    return Path(env["nnUNet_raw"]) / name


def arrays(folder):
    return {path.relative_to(folder): np.asarray(nib.load(path).dataobj) for path in folder.glob("*/*.nii.gz")}


def test_without_nnunets_folders_there_is_one_clear_line(tools, env, tmp_path):
    root = write_training(tools, tmp_path / "atlas", 2)
    done = tools.run_script(501, "-i", root, env={key: env[key] for key in env if not key.startswith("nnUNet")})
    assert done.returncode == 1
    assert done.stderr.startswith("error: The environment variable nnUNet_raw is not set.")
    assert len(done.stderr.strip().splitlines()) == 1


def test_without_nnunet_preprocessed_the_folds_stay_beside_the_images(tools, env, tmp_path):
    root = write_training(tools, tmp_path / "atlas", 3)
    half = {key: env[key] for key in env if key != "nnUNet_preprocessed"}
    done = tools.run_script(501, "-i", root, "-np", 1, env=half)
    assert done.returncode == 0, done.stderr
    assert "nnUNet_preprocessed is not set" in done.stdout
    assert len(json.loads((dataset(env) / "conversion" / "splits_final.json").read_text())) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-i", "nowhere"], "There is no folder nowhere"),
        (["-i", "archive.zip"], "archive.zip is a file, not a folder"),
        (["-i", "atlas", "--images_only"], "-o names the folder"),
        (["-i", "atlas", "-o", "out"], "-o names the folder"),
        (["-i", "atlas", "--images_only", "-o", "atlas/../atlas"], "-i and -o are the same folder"),
        (["-i", "atlas", "-d", "1000"], "three digits"),
        (["-i", "atlas", "--skull_strip", "hd-bet", "-device", "cpu"], "HD-BET is not installed"),
    ],
)
def test_mistakes_get_one_line(tools, env, tmp_path, monkeypatch, capsys, options, message):
    from nnunet_ssl.conversion import atlas_v2 as Dataset501_ATLASv2
    from nnunet_ssl.imaging import skull_strip

    monkeypatch.setattr(skull_strip.importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    write_training(tools, tmp_path / "atlas", 1)
    (tmp_path / "archive.zip").touch()
    monkeypatch.setattr(sys, "argv", ["Dataset501_ATLASv2.py", *options])
    with pytest.raises(SystemExit) as caught:
        Dataset501_ATLASv2.main()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not Path(env["nnUNet_raw"]).exists()


def test_a_dry_run_tells_and_writes_nothing(tools, env, tmp_path):
    root = write_training(tools, tmp_path / "atlas", 2)
    before = tools.snapshot(tmp_path)
    done = tools.run_script(501, "-i", root, "--dry_run", env=env)
    assert done.returncode == 0, done.stderr
    assert "2 training cases, sub-r001s001_ses-1 ... sub-r001s002_ses-1" in done.stdout
    assert tools.snapshot(tmp_path) == before and not Path(env["nnUNet_raw"]).exists()


def test_a_dry_run_calls_new_patients_neither_training_nor_test(tools, env, tmp_path):
    for part in ("Training", "Testing"):
        path = tmp_path / "new" / part / "sub-1" / f"sub-1_ses-{part}_T1w.nii.gz"
        tools.write_nifti(path, np.ones(SHAPE, np.float32))
    done = tools.run_script(501, "-i", tmp_path / "new", "--images_only", "-o", "out", "--dry_run", env=env)
    assert done.returncode == 0, done.stderr
    assert "  2 cases, sub-1_ses-Testing ... sub-1_ses-Training" in done.stdout
    assert "training" not in done.stdout and "test cases" not in done.stdout


def finished(folder):
    records = folder.glob("conversion/cases/[!.]*.json")
    return sum(json.loads(path.read_text())["made_from"] is not None for path in records)


@pytest.mark.slow
def test_a_killed_run_is_continued_and_ends_like_an_unbroken_one(tools, env, tmp_path):
    root = write_training(tools, tmp_path / "atlas", 40)
    unbroken = tools.environment(tmp_path / "unbroken")
    assert tools.run_script(501, "-i", root, "-np", 1, env=unbroken).returncode == 0
    script = Path(__file__).parents[2] / "dataset_conversion" / "Dataset501_ATLASv2.py"
    process = subprocess.Popen(
        [sys.executable, script, "-i", root, "-np", "2"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while finished(dataset(env)) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # its workers end by themselves
    done_before = finished(dataset(env))
    assert 3 <= done_before < 40
    assert not (dataset(env) / "dataset.json").exists()
    (dataset(env) / "imagesTr" / ".77.partial.sub-r001s009_ses-1_0000.nii.gz").write_bytes(b"half")
    done = tools.run_script(501, "-i", root, "-np", 1, env=env)
    assert done.returncode == 0 and f"40 cases; {done_before} are already converted." in done.stdout, done.stderr
    expected, found = arrays(dataset(unbroken)), arrays(dataset(env))
    assert expected.keys() == found.keys() and len(found) == 80
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array)
    assert not list(dataset(env).rglob(".*"))


def test_a_changed_or_removed_source_is_taken_up_and_nothing_else_is_touched(tools, env, tmp_path):
    root = write_training(tools, tmp_path / "atlas", 3)
    assert tools.run_script(501, "-i", root, "-np", 1, env=env).returncode == 0
    before = tools.snapshot(dataset(env))
    mask = next((root / "Training" / "R001" / "sub-r001s001").rglob("*mask.nii.gz"))
    tools.write_nifti(mask, np.zeros(SHAPE, np.uint8))
    for path in (root / "Training" / "R001" / "sub-r001s003").rglob("*.nii.gz"):
        path.unlink()
    done = tools.run_script(501, "-i", root, "-np", 1, env=env)
    assert "2 cases; 1 are already converted." in done.stdout
    assert "Removed 1 cases that are not part of the data set any more: sub-r001s003_ses-1" in done.stdout
    folder = dataset(env)
    assert not np.asarray(nib.load(folder / "labelsTr" / "sub-r001s001_ses-1.nii.gz").dataobj).any()
    kept = folder / "imagesTr" / "sub-r001s002_ses-1_0000.nii.gz"
    assert kept.stat().st_mtime_ns == before[kept]
    assert not list(folder.rglob("sub-r001s003*"))
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 2


def test_cases_whose_names_end_in_four_digits_are_ones_own_at_the_next_call(tmp_path):
    target = Target(folder=tmp_path, channels=("dwi", "flair"))
    case = Case(id="patient_0012", subject="patient_0012", images={}, masks=(), labelled=True)
    for path in target.outputs(case):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    target.record_path(case.id).parent.mkdir(parents=True)
    target.record_path(case.id).write_text("{}")
    _refuse_foreign_files(target)
    (tmp_path / "labelsTr" / "patient.nii.gz").touch()
    with pytest.raises(UserError, match=r"1 images that this script didn't make, such as patient\.nii\.gz"):
        _refuse_foreign_files(target)


def test_a_data_set_of_another_origin_is_neither_mixed_nor_overwritten(tools, env, tmp_path):
    root = write_training(tools, tmp_path / "atlas", 1)
    theirs = tools.write_nifti(dataset(env) / "imagesTr" / "ATLAS_001_0000.nii.gz", np.ones(SHAPE, np.uint8))
    before = tools.snapshot(dataset(env))
    done = tools.run_script(501, "-i", root, "-np", 1, env=env)
    assert done.returncode == 1
    assert f"1 images that this script didn't make, such as {theirs.name}" in done.stderr
    assert tools.snapshot(dataset(env)) == before


def test_patients_gather_in_the_folder_for_prediction_even_inside_the_sources(tools, env, tmp_path):
    root = write_training(tools, tmp_path / "new", 1)
    out = root / "prepared"
    for first in (1, 2):
        write_training(tools, root, 1, first=first)
        done = tools.run_script(501, "-i", root, "--images_only", "-o", out, "-np", 1, env=env)
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.glob("*.nii.gz")) == [
        "sub-r001s001_ses-1_0000.nii.gz",
        "sub-r001s002_ses-1_0000.nii.gz",
    ]
    assert not Path(env["nnUNet_raw"]).exists()


def test_a_patient_of_the_same_name_never_takes_anothers_place(tools, env, tmp_path):
    for patient in "AB":
        tools.write_nifti(tmp_path / patient / "scan_t1.nii.gz", np.full(SHAPE, ord(patient), np.float32))
    first, second = (
        tools.run_script(501, "-i", tmp_path / patient, "--images_only", "-o", tmp_path / "out", "-np", 1, env=env)
        for patient in "AB"
    )
    assert first.returncode == 0, first.stderr
    assert second.returncode == 1
    assert f"{tmp_path}/A/scan_t1.nii.gz already; {tmp_path}/B/scan_t1.nii.gz would take its place" in second.stderr
    assert np.unique(nib.load(tmp_path / "out" / "scan_0000.nii.gz").dataobj) == [ord("A")]


@pytest.fixture
def fake_hd_bet(env, tmp_path):
    """A package with HD-BET's names whose "network" calls everything above 10 brain, for other processes."""
    package = tmp_path / "site" / "HD_BET"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "paths.py").write_text(
        f"folder_with_parameter_files = {str(tmp_path / 'params')!r}\nZENODO_DOWNLOAD_URL = ''"
    )
    (package / "checkpoint_download.py").write_text("def maybe_download_parameters():\n    raise OSError\n")
    (package / "hd_bet_prediction.py").write_text(
        textwrap.dedent(
            """
            class Predictor:
                def predict_single_npy_array(self, image, properties):
                    return (image[0] > 10).astype("uint8")

            def get_hdbet_predictor(use_tta, device, verbose=False):
                return Predictor()
            """
        )
    )
    weights = tmp_path / "params" / "fold_all" / "checkpoint_final.pth"
    weights.parent.mkdir(parents=True)
    weights.touch()
    return env | {"PYTHONPATH": str(package.parent)}


def test_skull_stripping_zeroes_what_is_no_brain_and_counts_the_lesion_voxels_outside(tools, fake_hd_bet, tmp_path):
    root = write_training(tools, tmp_path / "atlas", 1)
    plain = tools.run_script(501, "-i", root, "-np", 1, env=fake_hd_bet)
    assert "still have their skull" in plain.stdout
    unstripped = arrays(dataset(fake_hd_bet))
    done = tools.run_script(501, "-i", root, "--skull_strip", "hd-bet", "-device", "cpu", "-np", 1, env=fake_hd_bet)
    assert done.returncode == 0 and "1 cases; 0 are already converted." in done.stdout, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("Skull-stripped with HD-BET")
    image, label = Path("imagesTr/sub-r001s001_ses-1_0000.nii.gz"), Path("labelsTr/sub-r001s001_ses-1.nii.gz")
    stripped = arrays(dataset(fake_hd_bet))
    brain = unstripped[image] > 10
    np.testing.assert_array_equal(stripped[image], unstripped[image] * brain)
    np.testing.assert_array_equal(stripped[label], unstripped[label])
    row = tools.report_of(dataset(fake_hd_bet))["sub-r001s001_ses-1"]
    outside = int((unstripped[label].astype(bool) & ~brain).sum())
    assert int(row["label_voxels_outside_brain"]) == outside > 0
    assert f"{outside} label voxels lie outside HD-BET's brain mask" in row["notes"]


def test_a_case_without_a_brain_is_skipped_and_an_implausible_volume_flagged(tools, fake_hd_bet, tmp_path):
    root = write_training(tools, tmp_path / "atlas", 3)
    for number, spacing in ((2, 2), (3, 7)):
        path = next((root / "Training" / "R001" / f"sub-r001s{number:03d}").rglob("*T1w.nii.gz"))
        value = np.float32(5 if number == 2 else 20)
        tools.write_nifti(path, np.full(SHAPE, value), np.diag([spacing, spacing, spacing, 1.0]))
    options = ["--skull_strip", "hd-bet", "-device", "cpu", "-np", 1]
    done = tools.run_script(501, "-i", root, *options, env=fake_hd_bet)
    assert done.returncode == 0, done.stderr
    folder = dataset(fake_hd_bet)
    assert "HD-BET found no brain in t1" in tools.skipped_in(folder)["sub-r001s002_ses-1"]
    assert not list(folder.rglob("sub-r001s002*"))
    rows = tools.report_of(folder)
    assert rows.keys() == {"sub-r001s001_ses-1", "sub-r001s003_ses-1"}
    assert "CHECK: HD-BET's brain mask of 16 ml" in rows["sub-r001s001_ses-1"]["notes"]
    assert float(rows["sub-r001s003_ses-1"]["brain_ml"]) == pytest.approx(1383, abs=1)
    assert "brain mask of" not in rows["sub-r001s003_ses-1"]["notes"]


def test_stripping_needs_a_contrast_that_hd_bet_knows(tools, fake_hd_bet, tmp_path):
    scans = tmp_path / "new" / "sub-1" / "dwi"
    tools.write_nifti(scans / "sub-1_dwi.nii.gz", np.ones(SHAPE, np.float32))
    options = ["--images_only", "-o", tmp_path / "out", "--skull_strip", "hd-bet", "--channels", "dwi"]
    done = tools.run_script(502, "-i", tmp_path / "new", *options, env=fake_hd_bet)
    assert done.returncode == 1 and "HD-BET knows T1, T2 and FLAIR, not dwi" in done.stderr


def test_raw_images_of_any_orientation_reach_the_network_as_the_converted_ones_do(tools, env, tmp_path):
    """nnU-Net's NibabelIOWithReorient turns both to RAS, and brings predictions back to the raw image's own order."""
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient

    array = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    ras = nib.Nifti1Image(array, tools.affine_of((1.0, 1.5, 2.0), (-8, -12, -9)))
    reader, seen = NibabelIOWithReorient(), []
    for axes in ("RAS", "LAS", "PIR", "LPI"):
        turn = nib.orientations.ornt_transform(nib.io_orientation(ras.affine), nib.orientations.axcodes2ornt(axes))
        path = tmp_path / "new" / f"head-{axes}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nib.save(ras.as_reoriented(turn), path)
        seen.append(reader.read_images([str(path)]))
    done = tools.run_script(501, "-i", tmp_path / "new", "--images_only", "-o", tmp_path / "out", "-np", 1, env=env)
    assert done.returncode == 0, done.stderr
    for axes in ("RAS", "LAS", "PIR", "LPI"):
        raw, out = tmp_path / "new" / f"head-{axes}.nii.gz", tmp_path / "out" / f"head-{axes}_0000.nii.gz"
        assert nib.aff2axcodes(nib.load(out).affine) == tuple(axes), "stored as it came"
        images, properties = reader.read_images([str(out)])
        np.testing.assert_array_equal(images, seen[0][0])
        reader.write_seg((images[0] > 0.5).astype(np.uint8), str(tmp_path / "seg.nii.gz"), properties)
        segmentation, source = nib.load(tmp_path / "seg.nii.gz"), nib.load(raw)
        np.testing.assert_allclose(segmentation.affine, source.affine, atol=1e-5)
        np.testing.assert_array_equal(segmentation.get_fdata(), source.get_fdata(dtype=np.float32) > 0.5)
