"""MetaImage and NIfTI are one image: the same voxels at the same places."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scans import scan

from nnunet_ssl.errors import UserError
from nnunet_ssl.imaging.geometry import same_grid
from nnunet_ssl.imaging.metaimage import read_image, write_image


@pytest.mark.parametrize("flip", [1.0, -1.0], ids=["right-handed", "left-handed"])
def test_a_volume_comes_back_from_both_formats(tmp_path, flip):
    volume = scan()
    volume.affine[:, 0] *= flip
    for name in ("image.mha", "image.nii.gz"):
        write_image(tmp_path / name, volume)
        found = read_image(tmp_path / name)
        assert np.array_equal(found.array, volume.array) and same_grid(found, volume)


def test_itk_and_nibabel_see_the_same_places(tmp_path):
    """SimpleITK itself makes a MetaImage of a NIfTI file."""
    write_image(tmp_path / "image.nii.gz", scan())
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "image.nii.gz")), str(tmp_path / "image.mha"))
    ours, theirs = read_image(tmp_path / "image.mha"), nib.load(tmp_path / "image.nii.gz")
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-5)
    assert np.array_equal(ours.array, theirs.get_fdata(dtype=np.float32))


def test_a_mask_is_written_in_eight_bits(tmp_path):
    write_image(tmp_path / "mask.mha", scan().with_array(scan().array > 120))
    assert sitk.ReadImage(str(tmp_path / "mask.mha")).GetPixelID() == sitk.sitkUInt8


def slices(path):
    sitk.WriteImage(sitk.Image(5, 6, sitk.sitkFloat32), str(path))


def colours(path):
    sitk.WriteImage(sitk.Image([5, 6, 7], sitk.sitkVectorUInt8, 3), str(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (slices, "2 dimensions and 1 values a voxel"),
        (colours, "3 dimensions and 3 values a voxel"),
        (
            lambda path: path.write_bytes(b"ObjectType = Image\nNDims = 3"),
            "can't be read as MetaImage: .*cannot be read",
        ),
        (lambda path: None, "There is no image"),
    ],
)
def test_what_is_no_volume_is_refused(tmp_path, make, message):
    make(tmp_path / "image.mha")
    with pytest.raises(UserError, match=message):
        read_image(tmp_path / "image.mha")


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(UserError, match="neither NIfTI"):
        read_image(tmp_path / "image.png")
