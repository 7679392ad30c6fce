"""The geometry of a view: its affine map, the part of the volume it needs, and the resampling.

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

    What lies outside the volume repeats its edge: :func:`resample` clamps positions to the box, so nothing is padded.

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
    grid = _sampling_grid(matrix, centre, patch_size, crop.shape, crop.device)
    view = F.grid_sample(crop.float()[None, None], grid, mode="bilinear", padding_mode="border", align_corners=False)
    return view[0, 0]


def _sampling_grid(
    matrix: np.ndarray, centre: np.ndarray, patch_size: Sequence[int], size: Sequence[int], device: torch.device
) -> Tensor:
    """Positions in grid_sample's units (-1 and 1 are the crop's outer faces), (1, *patch_size, 3), last axis first.

    `F.affine_grid` does the same with a matrix product, which loses half a voxel's tenth under TF32; sums do not.
    """
    length = np.asarray(size)
    per_voxel = 2 * matrix / length[:, None]
    at_centre = (2 * centre + 1) / length - 1
    offsets = [torch.arange(n, dtype=torch.float32, device=device) - (n - 1) / 2 for n in patch_size]
    grid = torch.empty((1, *patch_size, 3), dtype=torch.float32, device=device)
    for axis in range(3):
        x, y, z = (float(step) * offset for step, offset in zip(per_voxel[axis], offsets))
        plane = (x + float(at_centre[axis]))[:, None] + y
        torch.add(plane[:, :, None], z, out=grid[0, ..., 2 - axis])
    return grid
