"""Smooth random fields in millimetres: a subject looks the same at every voxel size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

Axes = Sequence[np.ndarray]
"""Three one-dimensional arrays: the coordinates in mm of a grid's planes along x, y and z."""

Box = Sequence[tuple[float, float]]
"""Three (low, high) pairs in mm."""

# Mean square of a cubic B-spline expansion with unit-variance coefficients, along one axis.
_BSPLINE_POWER = 0.4794


def box_of(axes: Axes) -> Box:
    """Return the smallest box that holds a grid."""
    return [(float(axis.min()), float(axis.max())) for axis in axes]


def random_coefficients(rng: np.random.Generator, box: Box, knot_mm: float) -> np.ndarray:
    """Draw standard-normal B-spline coefficients for knots `knot_mm` apart that cover `box`."""
    return rng.standard_normal([int(np.ceil((high - low) / knot_mm)) + 4 for low, high in box], dtype=np.float32)


def bspline(coefficients: np.ndarray, box: Box, knot_mm: float, axes: Axes) -> np.ndarray:
    """Evaluate a cubic B-spline expansion on a grid; separable, so 10 million voxels take a fraction of a second.

    Args:
        coefficients: (KX, KY, KZ); the knot of index 1 lies at the box's lower corner.
        box: the box the coefficients were drawn for.
        knot_mm: distance of the knots in mm.
        axes: the grid's coordinates in mm.

    Returns:
        float32 array (X, Y, Z).
    """
    values = coefficients.astype(np.float32)
    for axis, (low, _) in zip(axes, box):
        weights = _cubic_weights((np.asarray(axis) - low) / knot_mm + 1, values.shape[0])
        values = np.tensordot(values, weights, axes=(0, 1))  # the consumed axis returns last: three turns, old order
    return np.ascontiguousarray(values)


def random_field(rng: np.random.Generator, axes: Axes, knot_mm: float, box: Box | None = None) -> np.ndarray:
    """Draw a smooth field of mean 0 and variance 1; `knot_mm` is about half its correlation length.

    With an explicit `box` the draw does not depend on the grid, so grids of different voxel size sample one field.
    """
    box = box_of(axes) if box is None else box
    coefficients = random_coefficients(rng, box, knot_mm)
    return bspline(coefficients, box, knot_mm, axes) / np.float32(_BSPLINE_POWER**1.5)


def refine(coarse: np.ndarray, box: Box, step_mm: float, axes: Axes) -> np.ndarray:
    """Interpolate values known every `step_mm` from the box's lower corner onto a finer grid (cubic spline)."""
    padded = np.pad(coarse, 1, mode="reflect", reflect_type="odd")  # index 1 at the corner, as `bspline` has it
    return bspline(ndimage.spline_filter(padded, order=3, mode="mirror"), box, step_mm, axes)


def _cubic_weights(positions: np.ndarray, n_knots: int) -> np.ndarray:
    """Return the (len(positions), n_knots) matrix of cubic B-spline weights; positions count in knots."""
    distance = np.abs(positions[:, None] - np.arange(n_knots)[None, :])
    inner = 2 / 3 - distance**2 + distance**3 / 2
    outer = (2 - distance) ** 3 / 6
    return np.where(distance < 1, inner, np.where(distance < 2, outer, 0)).astype(np.float32)
