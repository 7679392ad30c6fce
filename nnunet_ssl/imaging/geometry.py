"""Images with their place in the world: read, compare, bring a mask onto an image's grid, write.

Affines map voxel indices to RAS+ millimetres, as nibabel has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from scipy import ndimage

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import written_beside
from nnunet_ssl.imaging.headers import BadScan, is_default, open_nifti

SAME_PLACE_VOXELS = 0.1
"""Grids whose corners lie closer than this fraction of a voxel are one grid; headers differ by rounding."""

NEAREST_VOXELS = 0.51
"""A mask that lies off an image's grid by no more than half a voxel is copied voxel by voxel: that is what
nearest-neighbour interpolation would make of it, and nothing is lost."""

Alignment = Literal["same grid", "same lattice", "nearest voxels", "no orientation in header", "resampled"]


@dataclass(frozen=True)
class Volume:
    """A 3-D image and where it lies.

    Attributes:
        array: (X, Y, Z), as stored.
        affine: (4, 4), voxel index to RAS+ mm.
        oriented: False when the file gave neither sform nor qform, so that the affine is a guess.
        notes: what is odd about the file's header, and was mended.
    """

    array: np.ndarray
    affine: np.ndarray
    oriented: bool = True
    notes: tuple[str, ...] = ()

    @classmethod
    def empty(cls, shape: tuple[int, ...], affine: np.ndarray) -> Volume:
        """Return a grid without an image: zeros that take no memory."""
        return cls(np.broadcast_to(np.float32(0), tuple(shape)), affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        x, y, z = nib.affines.voxel_sizes(self.affine).tolist()
        return x, y, z

    @property
    def voxel_ml(self) -> float:
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000

    @property
    def orientation(self) -> str:
        return "".join(nib.aff2axcodes(self.affine))

    def with_array(self, array: np.ndarray) -> Volume:
        """Return another image on the same grid."""
        return replace(self, array=array)


def read_volume(path: Path | str) -> Volume:
    """Read a NIfTI image as float32; see :func:`nnunet_ssl.imaging.headers.open_nifti` for what is checked and mended.

    Raises:
        UserError: the file is no image, is broken, holds more than one volume, or has an impossible geometry.
    """
    volume = _read(path)
    return volume.with_array(volume.array.astype(np.float32))


def read_mask(path: Path | str) -> Volume:
    """Read a mask of any type and scale: what is greater than 0 belongs to it (NaN does not). The array is bool.

    Raises:
        UserError: as :func:`read_volume`.
    """
    volume = _read(path)
    with np.errstate(invalid="ignore"):
        return volume.with_array(volume.array > 0)


def read_scan(path: Path | str) -> Volume:
    """Read a NIfTI image in the type that its header asks for.

    Raises:
        BadScan: the reason why it cannot be used.
        MemoryError: the image is larger than the memory.
    """
    opened = open_nifti(Path(path))
    return Volume(opened.voxels(), opened.affine, opened.oriented, opened.notes)


def _read(path: Path | str) -> Volume:
    try:
        return read_scan(path)
    except BadScan as reason:
        raise UserError(f"{path} can't be read: {reason}.") from reason


def write_volume(path: Path | str, volume: Volume) -> None:
    """Write a volume as NIfTI with sform and qform both set to its affine; booleans become uint8."""
    array = volume.array.astype(np.uint8) if volume.array.dtype == bool else volume.array
    image = nib.Nifti1Image(array, volume.affine)
    image.set_sform(volume.affine, code=1)
    image.set_qform(volume.affine, code=1)
    image.header.set_xyzt_units("mm")
    with written_beside(path) as partial:
        nib.save(image, partial)


def same_grid(first: Volume, second: Volume) -> bool:
    """Tell whether two volumes have the same shape and, up to rounding, the same place for every voxel."""
    if first.array.shape != second.array.shape:
        return False
    mapping = np.linalg.inv(first.affine) @ second.affine
    return _deviation(mapping, np.eye(3), np.zeros(3), first.array.shape) <= SAME_PLACE_VOXELS


def alike_but_unplaced(first: Volume, second: Volume) -> bool:
    """Tell whether two volumes of one case can only belong together voxel by voxel: they have the same shape, and the
    header of one of them says nothing of its place, by its codes or by a default affine.

    A default affine counts where the two headers make the volumes cover the same box: one is the other turned.
    """
    if first.array.shape != second.array.shape:
        return False
    if not (first.oriented and second.oriented):
        return True
    if not (is_default(first.affine) or is_default(second.affine)):
        return False
    mapping = np.linalg.inv(second.affine) @ first.affine
    corners = nib.affines.apply_affine(mapping, corners_of(first.array.shape))
    low, high = corners.min(axis=0), corners.max(axis=0)
    last = np.array(second.array.shape) - 1
    return bool(max(np.abs(low).max(), np.abs(high - last).max()) > NEAREST_VOXELS)


def voxels_outside(mask: Volume, image: Volume) -> int:
    """Count the voxels of a mask (bool) whose centres lie outside an image's field of view, by their headers."""
    places = nib.affines.apply_affine(np.linalg.inv(image.affine) @ mask.affine, np.argwhere(mask.array))
    inside = (places >= -NEAREST_VOXELS) & (places <= np.array(image.array.shape) - 1 + NEAREST_VOXELS)
    return int((~inside.all(axis=1)).sum())


def lesions_lost(mask: Volume, image: Volume, resampled: np.ndarray) -> int:
    """Count the lesions (26-connected) of a mask that have no voxel in what resampling onto the image's grid made."""
    numbered, count = ndimage.label(mask.array, structure=np.ones((3, 3, 3)))
    voxels = np.argwhere(mask.array)
    places = np.rint(nib.affines.apply_affine(np.linalg.inv(image.affine) @ mask.affine, voxels)).astype(int)
    kept = ((places >= 0) & (places < image.array.shape)).all(axis=1)
    kept[kept] = resampled[tuple(places[kept].T)]
    return count - len(np.unique(numbered[tuple(voxels[kept].T)]))


def align_mask(mask: Volume, image: Volume) -> tuple[np.ndarray, Alignment]:
    """Bring a mask onto an image's grid, without touching a voxel wherever that is possible.

    Args:
        mask: boolean volume.
        image: whose grid is wanted.

    Returns:
        the mask on the image's grid, bool (X, Y, Z), and how it got there: "same grid"; "same lattice" (the voxels
        coincide but are stored in another order or cover another field of view: they are copied one by one); "nearest
        voxels" (copied as well, though the headers disagree by up to half a voxel); "no orientation in header" (see
        :func:`alike_but_unplaced`); or "resampled".
    """
    if same_grid(mask, image):
        return mask.array, "same grid"
    if alike_but_unplaced(mask, image):
        return mask.array, "no orientation in header"
    mapping = np.linalg.inv(image.affine) @ mask.affine
    turn, shift = np.rint(mapping[:3, :3]), np.rint(mapping[:3, 3])
    if (np.abs(turn).sum(axis=0) == 1).all() and (np.abs(turn).sum(axis=1) == 1).all():
        deviation = _deviation(mapping, turn, shift, mask.array.shape)
        if deviation <= NEAREST_VOXELS:
            copied = _copy_voxels(mask.array, image.array.shape, turn.astype(int), shift.astype(int))
            return copied, "same lattice" if deviation <= SAME_PLACE_VOXELS else "nearest voxels"
    return _resample_mask(mask, image), "resampled"


def canonical(volume: Volume) -> Volume:
    """Return the volume with its axes turned and flipped to point as closely as possible to right, anterior, superior,
    as nnU-Net's NibabelIOWithReorient does."""
    turn = nib.io_orientation(volume.affine)
    affine = volume.affine @ nib.orientations.inv_ornt_aff(turn, volume.array.shape)
    return replace(volume, array=nib.apply_orientation(volume.array, turn), affine=affine)


def onto_grid(moving: Volume, fixed: Volume) -> Volume:
    """Bring an image onto a grid by their affines: voxel by voxel where one grid is a part of the other or reaches
    beyond it, else as :func:`resample_onto` does; 0 outside. On the same grid it is the same array."""
    if same_grid(moving, fixed):
        return fixed.with_array(moving.array)
    mapping = np.linalg.inv(fixed.affine) @ moving.affine
    shift = np.rint(mapping[:3, 3]).astype(int)
    if _deviation(mapping, np.eye(3), shift, moving.array.shape) > SAME_PLACE_VOXELS:
        return resample_onto(moving, fixed)
    array = np.zeros(fixed.array.shape, moving.array.dtype)
    low = np.maximum(shift, 0)
    high = np.minimum(shift + moving.array.shape, array.shape).clip(low)
    array[tuple(map(slice, low, high))] = moving.array[tuple(map(slice, low - shift, high - shift))]
    return fixed.with_array(array)


def resample_onto(moving: Volume, fixed: Volume, matrix: np.ndarray | None = None, *, order: int = 1) -> Volume:
    """Resample `moving` onto the grid of `fixed`: smoothed first where the voxels grow, 0 outside.

    What was scanned reaches half a voxel beyond the outermost voxels' centres, 2.5 mm in slices of 5 mm: up to there,
    their values go on.

    Args:
        moving: the image to resample, float.
        fixed: gives the grid.
        matrix: (4, 4), fixed RAS mm -> moving RAS mm; None = the headers' geometry.
        order: of the interpolating spline; 1 = linear, which never overshoots.
    """
    to_moving = np.linalg.inv(moving.affine) @ (np.eye(4) if matrix is None else matrix) @ fixed.affine
    smooth = _blur_for(moving.array.astype(np.float32), to_moving)
    sampling = {"matrix": to_moving[:3, :3], "offset": to_moving[:3, 3], "output_shape": fixed.array.shape}
    values = ndimage.affine_transform(smooth, **sampling, order=order, mode="nearest")
    inside = np.ones(moving.array.shape, dtype=np.uint8)
    values *= ndimage.affine_transform(inside, **sampling, order=0, mode="grid-constant")  # 0 where no voxel is nearest
    return fixed.with_array(values)


def _deviation(mapping: np.ndarray, turn: np.ndarray, shift: np.ndarray, shape: tuple[int, ...]) -> float:
    """Return by how many voxels `mapping` (4 x 4) differs from ``turn @ index + shift`` at the corners of a grid."""
    corners = corners_of(shape)
    return float(np.abs(nib.affines.apply_affine(mapping, corners) - (corners @ turn.T + shift)).max())


def corners_of(shape: tuple[int, ...]) -> np.ndarray:
    """The indices (8, 3) of a grid's outermost voxels."""
    return np.array(np.meshgrid(*[(0, size - 1) for size in shape])).reshape(3, -1).T


def _copy_voxels(mask: np.ndarray, shape: tuple[int, ...], turn: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Copy each voxel of a mask to its place on a grid of another order or extent; voxels outside are lost."""
    result = np.zeros(shape, dtype=bool)
    places = np.argwhere(mask) @ turn.T + shift
    places = places[((places >= 0) & (places < shape)).all(axis=1)]
    result[tuple(places.T)] = True
    return result


def _resample_mask(mask: Volume, image: Volume) -> np.ndarray:
    """Resample a mask onto another lattice, with the threshold that best keeps the volume of what lies in the image.

    The mask is averaged over the image's voxels, so that thin parts weigh what they are.
    """
    fraction = resample_onto(mask, image).array
    inside = int(mask.array.sum()) - voxels_outside(mask, image)
    wanted = min(math.ceil(inside * mask.voxel_ml / image.voxel_ml - 0.5), int((fraction > 0.05).sum()))
    if wanted <= 0:
        return fraction > 0.5
    threshold = np.partition(fraction.ravel(), -wanted)[-wanted]
    return fraction >= threshold


def _blur_for(array: np.ndarray, to_array: np.ndarray) -> np.ndarray:
    """Blur an image against aliasing, for sampling at the points of `to_array` (index to index, 4 x 4)."""
    growth = np.linalg.norm(to_array[:3, :3], axis=1)  # a target voxel's size in voxels of the array, per axis
    sigma = np.sqrt(np.maximum(growth**2 - 1, 0)) / 2.355
    return ndimage.gaussian_filter(array, sigma, mode="nearest")
