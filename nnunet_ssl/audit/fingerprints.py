"""The content of a scan as a few thousand small numbers, which its copies share however they were processed.

A fingerprint is the image inside the brain, brought to MNI space and to 5 mm, less its local mean and over its local
spread: neither the skull nor the grid, the orientation, the scale of intensities or a bias field is in it. What is left
are the folds and ventricles of one head in one contrast.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnunet_ssl.imaging.geometry import Volume, canonical, resample_onto
from nnunet_ssl.imaging.metaimage import TO_LPS, to_sitk
from nnunet_ssl.imaging.registration import (
    Level,
    mutual_information,
    one_thread,
    to_matrix,
    working_copy,
)
from nnunet_ssl.imaging.standard_space import locate_brain, template

STEP_MM = 5.0
_LEVELS = 30  # per unit of the local spread: four spreads fit a byte
_SURROUNDINGS_MM = 12.0
_COMPARED_MM = 2.0
_DETAIL_MM = 3.0
_STEPS = (Level(shrink=2, smooth_mm=3.0, samples=0.3), Level(shrink=1, smooth_mm=1.0, samples=0.1))
_MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Fingerprint:
    """`values`: int8 (N,), N the same for all scans; `matrix`: (4, 4), MNI -> scan, RAS mm."""

    values: np.ndarray
    matrix: np.ndarray


def fingerprint(scan: Volume) -> Fingerprint:
    """Return a scan's fingerprint.

    Raises:
        RuntimeError: no brain can be placed in it, or it is constant.
    """
    scan = _clean(scan)
    if np.ptp(scan.array) == 0:
        raise RuntimeError("the image is constant")
    matrix = locate_brain(scan)
    grid, inside = _grid()
    detail = _less_surroundings(
        resample_onto(scan, grid, matrix).array, inside, _SURROUNDINGS_MM / STEP_MM, scaled=True
    )
    return Fingerprint(np.rint(_LEVELS * np.clip(detail, -4, 4)).astype(np.int8), matrix)


def similarities(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Correlate the `values` of fingerprints, (A, N) with (B, N).

    Returns:
        (A, B), of each pair the larger of two correlations: as they are, and with the left and right of the second
        exchanged, which headers may have wrong; see :data:`nnunet_ssl.audit.comparison.ALIKE`.
    """
    first, second = _normalised(first), _normalised(second)
    return np.maximum(first @ second.T, first @ second[:, _mirrored()].T)


def detail_in_common(first: Volume, second: Volume, matrices: tuple[np.ndarray, np.ndarray]) -> float:
    """Register two scans with each other, and correlate inside the brain what is finer than 3 mm or so.

    Args:
        first: one scan.
        second: another, with a similar fingerprint.
        matrices: of the two fingerprints.

    Returns:
        A correlation, see :data:`nnunet_ssl.audit.comparison.SAME_HEAD`; 0 where they cannot be registered.
    """
    fixed, moving = (working_copy(canonical(_clean(scan)), _COMPARED_MM, order=1) for scan in (first, second))
    place = Volume(template().inner.astype(np.float32), template().volume.affine)
    inside = resample_onto(place, fixed, np.linalg.inv(matrices[0])).array > 0.5
    found = []
    for exchange in (np.eye(4), _MIRROR):  # left and right, in MNI space
        start = matrices[1] @ exchange @ np.linalg.inv(matrices[0])
        try:
            moved = resample_onto(moving, fixed, _registered(fixed, moving, inside, start), order=1).array
        except RuntimeError:  # ITK's: they do not meet
            continue
        details = (_less_surroundings(array, inside, _DETAIL_MM / 2, scaled=False) for array in (fixed.array, moved))
        found.append(float(np.corrcoef(*(np.clip(one, *np.percentile(one, [1, 99])) for one in details))[0, 1]))
        if found[-1] > 0.5:
            break
    return max(np.nan_to_num(found), default=0.0)


def _clean(scan: Volume) -> Volume:
    return scan.with_array(np.nan_to_num(scan.array.astype(np.float32), posinf=0, neginf=0))


@functools.cache
def _grid() -> tuple[Volume, np.ndarray]:
    """The fingerprints' grid in MNI space, symmetric about the middle plane, and what of it lies inside the brain."""
    shape = (31, 37, 29)
    affine = np.diag([STEP_MM, STEP_MM, STEP_MM, 1.0])
    affine[:3, 3] = (-STEP_MM * (shape[0] - 1) / 2, -108, -60)
    grid = Volume.empty(shape, affine)
    inner = Volume(template().inner.astype(np.float32), template().volume.affine)
    return grid, resample_onto(inner, grid).array > 0.5


@functools.cache
def _mirrored() -> np.ndarray:
    """By place in a fingerprint: the place on the other side of the brain."""
    inside = _grid()[1]
    numbers = np.full(inside.shape, -1)
    numbers[inside] = np.arange(inside.sum())
    return numbers[::-1][inside]


def _less_surroundings(array: np.ndarray, inside: np.ndarray, sigma: float, *, scaled: bool) -> np.ndarray:
    """Subtract from the values inside (N,) the mean of what lies around each, `sigma` in voxels, and divide by the
    spread there if they are to be `scaled`."""
    weight = ndimage.gaussian_filter(inside.astype(np.float32), sigma) + 1e-6
    mean = ndimage.gaussian_filter(array * inside, sigma) / weight
    detail = array - mean
    if scaled:
        square = ndimage.gaussian_filter(array**2 * inside, sigma) / weight
        floor = 1e-3 * np.abs(array[inside]).mean() + 1e-9
        detail = detail / (np.sqrt(np.maximum(square - mean**2, 0)) + floor)
    return detail[inside]


def _normalised(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-6)


def _registered(fixed: Volume, moving: Volume, inside: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return the affine map from `fixed` to `moving`, RAS mm, found from `start`, by what is `inside` the brain."""
    images = to_sitk(fixed), to_sitk(moving)
    mask = sitk.GetImageFromArray(inside.T.astype(np.uint8))
    mask.CopyInformation(images[0])
    centre = (fixed.affine @ [*np.argwhere(inside).mean(axis=0), 1.0])[:3]
    linear, centre_there = start[:3, :3], (start @ [*centre, 1.0])[:3]
    flip = TO_LPS[:3, :3]
    transform = sitk.AffineTransform(
        (flip @ linear @ flip).ravel().tolist(), (flip @ (centre_there - centre)).tolist(), (flip @ centre).tolist()
    )
    with one_thread():
        for step in _STEPS:
            method = mutual_information(mask, transform, 0, step)
            method.SetOptimizerAsRegularStepGradientDescent(
                learningRate=1.0, minStep=1e-3, numberOfIterations=60, relaxationFactor=0.6
            )
            method.Execute(*images)
    return to_matrix(transform)
