"""The geometry of a view: its affine map, the part of the volume it needs, and the resampling of all views at once.

A view of P voxels shows, at the voxel o, the volume at the voxel position

    centre + matrix @ (o - (P - 1) / 2)

so the centre of the view always shows `centre`, whatever the matrix. Everything that moves a patch (flip, rotation,
scale, shear) is in that one matrix, and voxels are interpolated once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import Tensor

from nnunet_ssl.pretraining.views.transfer import send

VOXELS_AT_ONCE = {"cpu": 1, "gpu": 2**29}
"""Of crops padded to one size, 10 bytes each while they are made: more are resampled in several parts.

A GPU is to have few and large calls. A CPU has nothing to gain from them and padding to lose, so views go one by one.
"""


def affine_matrix(
    *,
    flip_axis: int | None,
    rotation: Sequence[float] | np.ndarray,
    scale: Sequence[float] | np.ndarray,
    shear: Sequence[float] | np.ndarray,
    spacing: Sequence[float],
) -> np.ndarray:
    """Compose the map from offsets in the view to offsets in the volume, both in voxels.

    In millimetres it is flip @ rotation @ shear @ scale. Three shears are enough: every linear map is a rotation times
    a triangular matrix (QR), and the triangular matrix is the shear times the scale.

    Args:
        flip_axis: the axis to mirror, or None.
        rotation: angles around the three axes, in radians, the first applied last.
        scale: factor along each axis of the view; above 1 the view covers more of the volume.
        shear: how far axis 0 leans with axis 1, axis 0 with axis 2, and axis 1 with axis 2.
        spacing: voxel size in mm along each axis.

    Returns:
        (3, 3) float64.
    """
    matrix = Rotation.from_euler("XYZ", rotation).as_matrix() @ _shear(shear) @ np.diag(scale)
    if flip_axis is not None:
        matrix[flip_axis] *= -1
    return matrix * np.asarray(spacing)[None, :] / np.asarray(spacing)[:, None]


def _shear(factors: Sequence[float] | np.ndarray) -> np.ndarray:
    matrix = np.eye(3)
    matrix[0, 1], matrix[0, 2], matrix[1, 2] = factors
    return matrix


def source_box(
    matrix: np.ndarray, centre: np.ndarray, patch_size: Sequence[int], volume_size: Sequence[int]
) -> np.ndarray:
    """The voxels that the view needs: the bounding box of its eight transformed corners, clipped to the volume.

    What lies outside the volume repeats its edge: :func:`resample` clamps positions to the box, so none of it is read.

    Returns:
        (3, 2) half-open voxel ranges, at least one voxel along each axis.
    """
    reach = np.abs(matrix) @ ((np.asarray(patch_size) - 1) / 2)
    last = np.asarray(volume_size) - 1
    start = np.clip(np.floor(centre - reach), 0, last)
    stop = np.clip(np.ceil(centre + reach), 0, last) + 1
    return np.stack([start, stop], axis=1).astype(np.int64)


def resample(crop: Tensor, matrix: np.ndarray, centre: np.ndarray, patch_size: Sequence[int]) -> Tensor:
    """Interpolate one view, trilinearly, repeating the edge of the crop outside it.

    Args:
        crop: (X, Y, Z) part of the volume, any floating type.
        matrix: (3, 3) from :func:`affine_matrix`.
        centre: (3,) voxel position of the centre of the view, counted from the first voxel of the crop.
        patch_size: voxels of the view along each axis.

    Returns:
        (*patch_size) float32, on the device of the crop.
    """
    return resample_all(crop.flatten(), np.array([crop.shape]), matrix[None], np.asarray(centre)[None], patch_size)[0]


def resample_all(
    voxels: Tensor, sizes: np.ndarray, matrices: np.ndarray, centres: np.ndarray, patch_size: Sequence[int]
) -> Tensor:
    """Interpolate the views of a batch as :func:`resample` does, in one call for all.

    Args:
        voxels: (sum of the crops' sizes,) crops of any size, one after the other, any floating type.
        sizes: (N, 3) voxels of each crop.
        matrices: (N, 3, 3).
        centres: (N, 3), each counted from the first voxel of its crop.
        patch_size: voxels of a view along each axis.

    Returns:
        (N, *patch_size) float32, on the device of the crops.
    """
    limit = VOXELS_AT_ONCE["cpu" if voxels.device.type == "cpu" else "gpu"]
    at_once = max(1, limit // int(sizes.max(axis=0).prod()))
    parts = range(0, len(sizes), at_once)
    pieces = voxels.split([int(sizes[first : first + at_once].prod(axis=1).sum()) for first in parts])
    views = []
    for first, piece in zip(parts, pieces):
        part = slice(first, first + at_once)
        crops = _of_one_size(piece, sizes[part]).float()
        grid = sampling_grid(matrices[part], centres[part], patch_size, crops.shape[1:], crops.device)
        views.append(F.grid_sample(crops[:, None], grid, padding_mode="border", align_corners=False)[:, 0])
    return torch.cat(views) if len(views) > 1 else views[0]


def sampling_grid(
    matrices: np.ndarray, centres: np.ndarray, patch_size: Sequence[int], size: Sequence[int], device: torch.device
) -> Tensor:
    """Where views of volumes of `size` look, in the units of `F.grid_sample` (-1 and 1 are the volume's outer faces).

    `F.affine_grid` does the same with a matrix product, which loses half a voxel's tenth under TF32; sums do not.

    Args:
        matrices: (N, D, D), in D = 2 or 3 dimensions.
        centres: (N, D) voxel positions.
        patch_size: D, voxels of a view along each axis.
        size: D, voxels of each volume.
        device: where the grid is made.

    Returns:
        (N, *patch_size, D) float32, last axis first.
    """
    lengths = np.asarray(size)
    per_voxel, at_centre = 2 * matrices / lengths[:, None], (2 * centres + 1) / lengths - 1
    numbers = np.concatenate([per_voxel, at_centre[..., None]], axis=-1)[:, ::-1].astype(np.float32)
    *steps, grid = send(torch.from_numpy(numbers), device).unbind(-1)
    grid = _along(grid[:, None], 0, len(patch_size))
    for axis, (length, step) in enumerate(zip(patch_size, steps)):
        offsets = torch.arange(length, dtype=torch.float32, device=device) - (length - 1) / 2
        grid = grid + _along(offsets[:, None] * step[:, None], axis, len(patch_size))
    return grid


def unravelled(index: Tensor, size: Sequence[int]) -> Tensor:
    """The places (..., D) that numbers (...) of a flattened grid of `size` stand for.

    `torch.unravel_index` sends the sizes to the device first, for which a GPU lets the CPU wait.
    """
    places = []
    for length in reversed(size):
        places.append(index % length)
        index = index // length
    return torch.stack(places[::-1], dim=-1)


def _of_one_size(voxels: Tensor, sizes: np.ndarray) -> Tensor:
    """Crops as a batch (N, *largest size), in which smaller ones repeat their edge."""
    largest = sizes.max(axis=0)
    if (sizes == largest).all():
        return voxels.view(-1, *largest)
    strides = np.stack([sizes[:, 1] * sizes[:, 2], sizes[:, 2], np.ones(len(sizes), int)], axis=1)
    first = np.cumsum(sizes.prod(axis=1)) - sizes.prod(axis=1)
    table = np.concatenate([sizes - 1, strides, first[:, None]], axis=1)
    table = table.astype(np.int32 if voxels.numel() < 2**31 else np.int64)
    *columns, index = send(torch.from_numpy(table), voxels.device).unbind(-1)
    index = _along(index[:, None], 0, 3)
    for axis, (last, stride) in enumerate(zip(columns[:3], columns[3:])):
        places = torch.arange(int(largest[axis]), dtype=index.dtype, device=voxels.device)
        index = index + _along(torch.minimum(places, last[:, None]) * stride[:, None], axis, 3)
    return voxels.index_select(0, index.flatten()).view(index.shape)


def _along(lines: Tensor, axis: int, dimensions: int) -> Tensor:
    """View (N, length, ...) so that the length runs along one of so many axes of a volume, the others being 1 long."""
    n, length, *rest = lines.shape
    return lines.view(n, *(length if each == axis else 1 for each in range(dimensions)), *rest)
