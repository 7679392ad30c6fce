"""What the tests of the conversion scripts share.

The replicas of the data sets are written here with nibabel alone, not with the project's phantoms, so that one mistake
about a layout can't hide in both.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "dataset_conversion"
UNTURNED, UNMOVED = np.eye(3), np.eye(4)


def write_nifti(path, array, affine=None, *, qform=1, sform=1, slope=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([2.0, 2, 2, 1]) if affine is None else affine
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine if sform else None, code=sform)
    image.set_qform(affine if qform else None, code=qform)
    if slope:
        image.header.set_slope_inter(slope, 0)
    nib.save(image, path)
    return path


def affine_of(spacing, origin=(0, 0, 0), rotation=UNTURNED, flips=(1, 1, 1)):
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag(np.multiply(spacing, flips))
    affine[:3, 3] = origin
    return affine


def draw_head(shape, affine, levels, *, seed, motion=UNMOVED, radius=(30, 36, 26)):
    """Sample a head of an ellipsoid with blobs of three tissues, which has moved by `motion` (RAS mm to RAS mm)."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    where = np.linalg.inv(motion) @ affine
    points = index @ where[:3, :3].T + where[:3, 3]
    rng = np.random.default_rng(seed)

    def inside(centre, radii):
        return (((points - centre) / radii) ** 2).sum(-1) < 1

    brain = inside((0, 0, 0), radius)
    image = np.where(brain, float(levels[0]), 0.0)
    for _ in range(25):
        blob = inside(rng.uniform(-0.75, 0.75, 3) * radius, rng.uniform(4, 10, 3))
        image[blob & brain] = levels[rng.integers(3)]
    return image * (1 + 0.02 * rng.standard_normal(shape))


def environment(folder):
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    return os.environ | {name: str(folder / name) for name in names} | {"OMP_NUM_THREADS": "1"}


def run_script(name, *arguments, env):
    """Run a conversion script as a user does."""
    command = [sys.executable, str(next(SCRIPTS.glob(f"Dataset{name}_*.py"))), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def plan_and_preprocess(number, env):
    """Run stock nnU-Net's planning and preprocessing with its integrity check; return what it said."""
    command = [Path(sys.executable).with_name("nnUNetv2_plan_and_preprocess"), "-d", str(number)]
    options = ["--verify_dataset_integrity", "-c", "3d_fullres", "-np", "1", "-npfp", "1"]
    done = subprocess.run([*command, *options], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "verify_dataset_integrity Done" in done.stdout
    assert "Warning" not in done.stdout
    folder = next(Path(env["nnUNet_preprocessed"]).glob(f"Dataset{number}_*")) / "nnUNetPlans_3d_fullres"
    return {path.stem for path in folder.glob("*.pkl")}


def snapshot(folder):
    """Return all files below a folder with the time of their last change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def read_table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def report_of(folder):
    return {row["case"]: row for row in read_table(folder / "conversion" / "report.tsv")}


def skipped_in(folder):
    return {row["what"]: row["reason"] for row in read_table(folder / "conversion" / "skipped.tsv")}


def check_geometry(folder, n_channels):
    """Check that all files of each case agree in shape, affine, spacing, and that labels are integers of {0, 1}."""
    cases = {path.name[: -len("_0000.nii.gz")]: path.parent for path in folder.glob("images*/*_0000.nii.gz")}
    assert cases
    for case, images in cases.items():
        channels = [nib.load(images / f"{case}_{i:04d}.nii.gz") for i in range(n_channels)]
        assert len(list(images.glob(f"{case}_????.nii.gz"))) == n_channels
        label_path = images.with_name(images.name.replace("images", "labels")) / f"{case}.nii.gz"
        label = [nib.load(label_path)] if label_path.exists() else []
        for other in [*channels[1:], *label]:
            assert other.shape == channels[0].shape
            np.testing.assert_array_equal(other.affine, channels[0].affine)
            np.testing.assert_array_equal(other.get_qform(coded=True)[0], channels[0].get_qform(coded=True)[0])
            assert other.header.get_zooms() == channels[0].header.get_zooms()
        for image in channels:
            assert np.isfinite(image.get_fdata()).all()
        for image in label:
            assert image.get_data_dtype() == np.uint8
            assert set(np.unique(image.dataobj)) <= {0, 1}
    return set(cases)


@pytest.fixture(scope="session")
def tools():
    """Functions, which importlib mode would not let a test module import from here."""
    functions = (
        *(write_nifti, affine_of, draw_head, environment, run_script, plan_and_preprocess),
        *(snapshot, report_of, skipped_in, check_geometry),
    )
    return SimpleNamespace(**{function.__name__: function for function in functions})


@pytest.fixture
def env(tmp_path, monkeypatch):
    """nnU-Net's three folders, for this process and for scripts."""
    variables = environment(tmp_path / "nnunet")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, variables[name])
    return variables
