"""Somebody's own labelled scans: what is an image and what a mask, and that neither moves without the other."""

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from nnunet_ssl.conversion import bids
from nnunet_ssl.conversion.preparations import PREPARATIONS
from nnunet_ssl.errors import UserError

SHAPE, T1_SHAPE = (20, 36, 30), (30, 44, 40)
FLAIR_AFFINE = np.array([[-3.0, 0, 0, 28.5], [0, 2.0, 0, -35], [0, 0, 2.0, -29], [0, 0, 0, 1]])  # LAS
T1_AFFINE = np.array([[0, 0, -2.0, 40], [2.0, 0, 0, -31], [0, -2.0, 0, 40], [0, 0, 0, 1]])  # anterior, inferior, left
BOTH = ("flair", "t1")


def lesion():
    mask = np.zeros(SHAPE, np.uint8)
    mask[12:15, 15:18, 12:15] = 1
    return mask


def write(tools, root, *names, array=None):
    for name in names:
        tools.write_nifti(root / f"{name}.nii.gz", np.ones((4, 4, 4), np.uint8) if array is None else array)


def find(root, channels=BOTH, masks="*lesion*", **options):
    cases, skipped = bids.find_cases(root, channels, masks, options.pop("images_only", False), **options)
    return {case.id: case for case in cases}, {item.what: item.reason for item in skipped}


def convert(root, *options):
    command = [sys.executable, "-m", "nnunet_ssl.conversion.bids", "-i", str(root), "-np", "1", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def root(tools, tmp_path):
    """A tree with what real trees hold beside the scans and the masks."""
    root = tmp_path / "bids"
    for subject in ("sub-01", "sub-02"):
        write(tools, root / subject / "anat", f"{subject}_FLAIR", f"{subject}_T1w", f"{subject}_acq-lesion2_T2w")
        write(tools, root / "derivatives" / "lesions" / subject / "anat", f"{subject}_label-lesion_mask")
    write(tools, root / "derivatives" / "lesions" / "sub-01" / "anat", "sub-01_FLAIR", "sub-01_brainmask_lesions")
    write(tools, root / "derivatives" / "fmriprep" / "sub-01" / "anat", "sub-01_desc-preproc_T1w", "sub-01_dseg")
    write(tools, root / "sub-03" / "anat", "sub-03_FLAIR", "sub-03_T1w", "sub-03_desc-brain_mask")
    write(tools, root / "sub-04" / "anat", "sub-04_FLAIR", "sub-04_ce-gad_T1w", "sub-04_lesion")
    return root


def test_scans_and_masks_are_told_by_their_names_and_the_rest_is_listed(root):
    cases, skipped = find(root, masks="*lesion*.nii.gz")
    assert set(cases) == {"sub-01", "sub-02"}
    assert [path.name for path in cases["sub-01"].images.values()] == ["sub-01_FLAIR.nii.gz", "sub-01_T1w.nii.gz"]
    assert "derivatives" not in cases["sub-01"].images["flair"].parts
    assert "no lesion mask" in skipped["sub-03"]
    assert skipped["sub-04"] == "no t1 image"
    assert "derived" in skipped["derivatives/fmriprep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz"]
    assert "derived" in skipped["sub-03/anat/sub-03_desc-brain_mask.nii.gz"]


@pytest.mark.parametrize(
    ("masks", "found"),
    [
        ("*lesion*", {"sub-01_label-lesion_mask.nii.gz", "sub-01_acq-lesion2_T2w.nii.gz"}),
        ("*Label-Lesion*", {"sub-01_label-lesion_mask.nii.gz"}),
        ("derivatives/*/sub-*_label-*", {"sub-01_label-lesion_mask.nii.gz"}),
    ],
)
def test_a_pattern_means_names_or_with_a_slash_paths(root, masks, found):
    cases, _ = find(root, masks=masks)
    assert {path.name for path in cases["sub-01"].masks} == found
    assert any(note.startswith("CHECK: the union of 2 masks") for note in cases["sub-01"].notes) == (len(found) > 1)


def test_a_contrast_enhanced_t1_is_none_without(root):
    cases, _ = find(root, channels=("flair", "t1c"))
    assert set(cases) == {"sub-04"}
    assert cases["sub-04"].images["t1c"].name == "sub-04_ce-gad_T1w.nii.gz"


def test_a_mask_without_a_session_belongs_to_the_only_one(tools, tmp_path):
    for session in ("sub-1_ses-a", "sub-2_ses-a", "sub-2_ses-b"):
        write(tools, tmp_path, f"{session}_FLAIR")
    write(tools, tmp_path, "sub-1_lesion", "sub-2_lesion")
    cases, skipped = find(tmp_path, channels=("flair",))
    assert set(cases) == {"sub-1_ses-a"}
    assert cases["sub-1_ses-a"].subject == "sub-1"
    assert {"sub-2_ses-a", "sub-2_ses-b"} <= set(skipped)
    assert "no scan of its session" in skipped["sub-2_lesion.nii.gz"]


def test_new_images_need_no_masks_and_missing_channels_are_allowed_if_asked(root):
    cases, _ = find(root, images_only=True)
    assert set(cases) == {"sub-01", "sub-02", "sub-03"}
    assert not any(case.labelled for case in cases.values())
    cases, _ = find(root, allow_missing=True)
    assert set(cases["sub-04"].images) == {"flair"}


def test_a_folder_without_masks_says_what_was_looked_for(root):
    with pytest.raises(UserError, match=r"lesion masks named \*roi\*.*sub-01: no lesion mask"):
        find(root, masks="*roi*")


@pytest.fixture
def labelled(tools, tmp_path):
    """Two subjects: the T1 of the first lies on the FLAIR's grid, that of the second elsewhere, on another grid."""
    root = tmp_path / "labelled"
    for number, (shape, affine) in enumerate([(SHAPE, FLAIR_AFFINE), (T1_SHAPE, T1_AFFINE)], start=1):
        folder, name = root / f"sub-{number}" / "anat", f"sub-{number}"
        flair = tools.draw_head(SHAPE, FLAIR_AFFINE, (400, 300, 100), seed=number).astype(np.int16)
        t1 = tools.draw_head(shape, affine, (250, 350, 90), seed=number).astype(np.int16)
        tools.write_nifti(folder / f"{name}_FLAIR.nii.gz", flair, FLAIR_AFFINE)
        tools.write_nifti(folder / f"{name}_T1w.nii.gz", t1, affine)
        tools.write_nifti(folder / f"{name}_lesion.nii.gz", lesion(), FLAIR_AFFINE)
    return root


def test_own_data_become_nnunets_on_the_grid_of_the_first_channel(tools, env, labelled):
    done = convert(labelled, "-d", "620", "--name", "Ours", "--channels", "flair", "t1")
    assert done.returncode == 0, done.stderr
    (folder,) = (labelled.parent / "nnunet" / "nnUNet_raw").glob("Dataset620_Ours")
    assert tools.check_geometry(folder, 2) == {"sub-1", "sub-2"}
    described = json.loads((folder / "dataset.json").read_text())
    assert described["channel_names"] == {"0": "FLAIR", "1": "T1"}
    assert described["prepared_as"] in PREPARATIONS
    for number in (1, 2):
        image = nib.load(folder / "imagesTr" / f"sub-{number}_0000.nii.gz")
        np.testing.assert_array_equal(image.affine, FLAIR_AFFINE)
        assert np.array_equal(nib.load(folder / "labelsTr" / f"sub-{number}.nii.gz").dataobj, lesion())
    kept = nib.load(folder / "imagesTr" / "sub-1_0001.nii.gz").get_fdata()
    np.testing.assert_array_equal(kept, nib.load(labelled / "sub-1/anat/sub-1_T1w.nii.gz").get_fdata())
    report = tools.report_of(folder)
    assert report["sub-1"].get("t1_registration") == ""
    assert report["sub-2"]["t1_registration"] == "rigid"
    assert float(report["sub-2"]["t1_shift_mm"]) < 3, "the headers had it right"


def test_a_mask_is_refused_that_lies_on_a_channel_which_is_moved(tools, labelled):
    mask = np.zeros(T1_SHAPE, np.uint8)
    mask[10:14, 20:24, 20:24] = 1
    tools.write_nifti(labelled / "sub-2/anat/sub-2_lesion.nii.gz", mask, T1_AFFINE)
    cases, _ = find(labelled)
    with pytest.raises(UserError, match="lies on the grid of t1, not of flair: name t1 first"):
        bids.prepare(cases["sub-2"])
    cases, _ = find(labelled, channels=("t1", "flair"))
    assert bids.prepare(cases["sub-2"]).channels["flair"].array.shape == T1_SHAPE


def test_an_image_or_a_map_of_probabilities_is_no_mask(tools, labelled):
    shown = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    tools.write_nifti(labelled / "sub-1/anat/sub-1_lesion.nii.gz", shown, FLAIR_AFFINE)
    cases, _ = find(labelled)
    with pytest.raises(UserError, match="different values, so it is no mask"):
        bids.prepare(cases["sub-1"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-d", "620", "--name", "Ours"], "Name the channels, first that on which the masks were drawn"),
        (["-d", "620", "--channels", "flair"], "Give the data set a name"),
        (["-d", "620", "--name", "a/b", "--channels", "flair"], "Give the data set a name"),
        (["--name", "Ours", "--channels", "flair"], "required: -d"),
    ],
)
def test_what_has_to_be_said_is_asked_for(env, tmp_path, options, words):
    done = convert(tmp_path, *options)
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr
