"""Images that challenges hand out: MetaImage (.mha) beside NIfTI, read and written on one grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import written_beside
from nnunet_ssl.imaging.geometry import Volume, read_volume, write_volume

NIFTI = (".nii.gz", ".nii")
META = (".mha", ".mhd")
TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From nibabel's millimetres to ITK's, and back."""


def read_image(path: Path) -> Volume:
    """Read a NIfTI or MetaImage file as float32.

    Raises:
        UserError: it is neither, is broken, or holds no single volume of numbers.
    """
    if path.name.lower().endswith(NIFTI):
        return read_volume(path)
    if path.name.lower().endswith(META):
        return _read_meta(path)
    raise UserError(f"{path} is neither NIfTI ({', '.join(NIFTI)}) nor MetaImage ({', '.join(META)}).")


def write_image(path: Path, volume: Volume) -> None:
    """Write a volume in the format that the name asks for; booleans become uint8."""
    if path.name.lower().endswith(NIFTI):
        write_volume(path, volume)
        return
    array = volume.array.astype(np.uint8) if volume.array.dtype == bool else volume.array
    with written_beside(path) as temporary:
        sitk.WriteImage(to_sitk(volume.with_array(array)), str(temporary), useCompression=True)


def to_sitk(volume: Volume) -> sitk.Image:
    """Return a volume as SimpleITK has it: axes (Z, Y, X) in NumPy, LPS millimetres."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array.T))
    affine = TO_LPS @ volume.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    return image


def from_sitk(image: sitk.Image) -> Volume:
    """Return a three-dimensional image of SimpleITK's as a volume, float32."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return Volume(sitk.GetArrayFromImage(image).T.astype(np.float32), TO_LPS @ affine)


def _read_meta(path: Path) -> Volume:
    if not path.is_file():
        raise UserError(f"There is no image {path}.")
    try:
        image = sitk.ReadImage(str(path), imageIO="MetaImageIO")
    except RuntimeError as error:
        said = [line for line in str(error).strip().splitlines() if not line.startswith("Reason: ")]  # errno
        raise UserError(f"{path} can't be read as MetaImage: {said[-1]}") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise UserError(
            f"{path} has {image.GetDimension()} dimensions and {image.GetNumberOfComponentsPerPixel()} values a voxel; "
            "needed is one volume."
        )
    return from_sitk(image)
