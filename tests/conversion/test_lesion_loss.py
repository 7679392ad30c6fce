"""What of a lesion arrives on its image's grid is measured; a case that fails takes no other one with it."""

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

SHAPE = (24, 28, 22)
AFFINE = np.diag([-1.0, 1, 1, 1])
AFFINE[:3, 3] = 98, -134, -72
TILTED = AFFINE @ nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.05, 0.2), [0.3, 0.1, 0.2])
STEM = "sub-r001s{:03d}_ses-1_{}.nii.gz"


def lesion():
    mask = np.zeros(SHAPE, np.uint8)
    mask[9:15, 10:16, 8:14] = 1  # 216 voxels
    return mask


def moved(affine, *mm):
    return nib.affines.from_matvec(np.eye(3), mm) @ affine


@pytest.fixture
def convert(tools, env, tmp_path, monkeypatch):
    """A function that writes ATLAS cases of one image each with the given masks, (array, affine), and converts them.

    Returns the folder, and for each case its label or None. A case beside them is always in order.
    """
    from nnunet_ssl.conversion import atlas_v2 as Dataset501_ATLASv2

    def run(*masks, image_affine=AFFINE):
        root = tmp_path / "atlas"
        for number, (array, affine) in enumerate([*masks, (lesion(), image_affine)], start=1):
            anat = root / "Training" / "R001" / f"sub-r001s{number:03d}" / "ses-1" / "anat"
            image = np.random.default_rng(number).random(SHAPE).astype(np.float32) + 1
            tools.write_nifti(anat / STEM.format(number, "T1w"), image, image_affine)
            mask = anat / STEM.format(number, "label-L_desc-T1lesion_mask")
            if callable(affine):
                affine(tools.write_nifti(mask, array, image_affine))
            else:
                tools.write_nifti(mask, array, affine, qform=0, sform=2)
        monkeypatch.setattr(sys, "argv", ["Dataset501_ATLASv2.py", "-i", str(root), "-np", "1"])
        Dataset501_ATLASv2.main()
        folder = Path(env["nnUNet_raw"]) / "Dataset501_ATLASv2"
        labels = [folder / "labelsTr" / f"sub-r001s{n:03d}_ses-1.nii.gz" for n in range(1, len(masks) + 2)]
        labels = [np.asarray(nib.load(path).dataobj) if path.exists() else None for path in labels]
        np.testing.assert_array_equal(labels.pop(), lesion())
        converted = 1 + sum(label is not None for label in labels)
        assert json.loads((folder / "dataset.json").read_text())["numTraining"] == converted
        assert len(list((folder / "imagesTr").iterdir())) == converted
        return folder, labels

    return run


DEFAULTS = [np.eye(4), np.diag([-1.0, -1, 1, 1]), np.diag([-1.0, 1, 1, 1]), np.diag([1.0, 1, 2, 1])]


@pytest.mark.parametrize("image_affine", [AFFINE, TILTED, moved(AFFINE, 0.4, 0.3, 0.2)])
def test_a_mask_whose_affine_is_a_default_is_taken_voxel_by_voxel_and_noted(convert, tools, image_affine):
    folder, labels = convert(*((lesion(), affine) for affine in DEFAULTS), image_affine=image_affine)
    for number, label in enumerate(labels, start=1):
        np.testing.assert_array_equal(label, lesion())
        row = tools.report_of(folder)[f"sub-r001s{number:03d}_ses-1"]
        assert "laid voxel by voxel" in row["notes"] and "CHECK" not in row["notes"]
        assert (row["mask_voxels"], row["label_voxels"], row["mask_voxels_outside"]) == ("216", "216", "0")
        assert float(row["mask_ml"]) == pytest.approx(float(row["label_ml"])) and float(row["mask_lost"]) == 0


def _singular(path):
    image = nib.load(path)
    for row in ("srow_x", "srow_y", "srow_z"):
        image.header[row] = 0
    image.header["qform_code"] = 0
    data = bytearray(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header).to_bytes())
    data[280:328], data[252:256] = bytes(48), b"\0\0\2\0"
    import gzip

    path.write_bytes(gzip.compress(bytes(data)))


@pytest.mark.parametrize(
    ("affine", "reason"),
    [
        (AFFINE * [[1000], [1000], [1000], [1]], "is no brain scan's"),  # microns
        (AFFINE / [[1000], [1000], [1000], [1]], "is no brain scan's"),  # metres
        (_singular, "not finite or not invertible"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "can't be read"),
    ],
)
def test_a_mask_with_an_impossible_header_costs_its_case_alone(convert, tools, affine, reason):
    folder, labels = convert((lesion(), affine))
    assert labels[0] is None
    assert reason in tools.skipped_in(folder)["sub-r001s001_ses-1"]


@pytest.mark.parametrize(("shift", "outside"), [(11, 72), (14, 180), (60, 216)])
def test_a_lesion_that_its_header_puts_outside_is_counted(convert, tools, shift, outside):
    """Same lattice and other lattice alike; a third is noted, most of it is an error."""
    whole, other = moved(AFFINE, -shift, 0, 0), moved(AFFINE, -shift, 0.4, 0.2) @ np.diag([1, 1.02, 0.97, 1])
    folder, labels = convert((lesion(), whole), (lesion(), other))
    for number, label in enumerate(labels, start=1):
        case = f"sub-r001s{number:03d}_ses-1"
        if outside > 108:
            assert label is None
            assert f"({outside} of 216 voxels lie outside the image)" in tools.skipped_in(folder)[case]
            continue
        row = tools.report_of(folder)[case]
        assert int(row["mask_voxels_outside"]) == outside
        assert float(row["mask_lost"]) == pytest.approx(outside / 216, abs=0.06)
        assert (
            "of the lesion of 0.21" in row["notes"]
            and f"CHECK: {outside} mask voxels lie outside the image" in row["notes"]
        )


def test_a_mask_resampled_without_loss_is_no_matter_to_check(convert, tools):
    folder, (label,) = convert((lesion(), moved(AFFINE, 0.4, 0.3, 0.2) @ np.diag([1, 1.02, 0.97, 1])))
    row = tools.report_of(folder)["sub-r001s001_ses-1"]
    assert row["mask_alignment"] == "resampled" and "CHECK" not in row["notes"]
    assert label.sum() == pytest.approx(216 * 1.02 * 0.97, rel=0.06)  # voxels of equal shares come together


def test_a_small_lesion_that_resampling_drops_beside_a_large_one_is_told(convert, tools):
    fine = np.kron(lesion(), np.ones((2, 2, 2), np.uint8))
    fine[2, 2, 2] = 1  # an eighth of a voxel of the image
    affine = AFFINE @ nib.affines.from_matvec(np.eye(3) / 2, [-0.25] * 3)
    folder, (label,) = convert((fine, affine))
    np.testing.assert_array_equal(label, lesion())
    assert "CHECK: 1 lesions have no voxel left" in tools.report_of(folder)["sub-r001s001_ses-1"]["notes"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError("Unable to allocate 9 PiB"), "not enough memory (Unable to allocate 9 PiB); try fewer"),
        (ZeroDivisionError("of\nsome kind"), "ZeroDivisionError: of some kind"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (np.linalg.LinAlgError("Singular matrix"), "Singular matrix"),
    ],
)
@pytest.mark.parametrize("place", ["read_mask", "write_volume", "align_mask"])
def test_any_error_of_one_case_skips_that_case_only(convert, tools, monkeypatch, error, reason, place):
    from nnunet_ssl.conversion import dataset as conversion

    working, calls = getattr(conversion, place), []

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise error
        return working(*arguments)

    monkeypatch.setattr(conversion, place, fail_once)
    folder, labels = convert((lesion(), AFFINE))
    assert labels[0] is None
    assert reason in tools.skipped_in(folder)["sub-r001s001_ses-1"]
    assert not list(folder.rglob("*r001s001*"))
    monkeypatch.setattr(conversion, place, working)
    _, (label,) = convert((lesion(), AFFINE))  # the next run tries again
    np.testing.assert_array_equal(label, lesion())


def test_a_full_disk_ends_the_run(convert, monkeypatch):
    from nnunet_ssl.conversion import dataset as conversion

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "write_volume", full)
    with pytest.raises((OSError, SystemExit), match="No space left"):
        convert((lesion(), AFFINE))
