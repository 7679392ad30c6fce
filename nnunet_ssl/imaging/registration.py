"""Rigid registration of two contrasts of one head: multi-resolution mutual information (SimpleITK), with a check."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnunet_ssl.imaging.geometry import Volume, resample_onto

WORKING_MM = 1.5
"""Both images are brought to isotropic voxels of this size for the search; the result is finer than a voxel."""

_COARSE = {"shrink": 4, "smooth_mm": 6.0, "samples": 0.5}
_FINE = {"shrink": 2, "smooth_mm": 1.5, "samples": 0.3}
_JUDGING_MM = 3.0
_DISPLACED_MM = 15.0
_DISTINCT = 1.5
_LARGEST_SHIFT_MM = 250.0
_SAME_ROTATION_DEG = 2.0
_SAME_SHIFT_MM = 2.0
_LARGEST_ROTATION_DEG = 60.0
_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, kw_only=True)
class Registration:
    """A rigid motion and how well it fits.

    Attributes:
        matrix: (4, 4), where a point of the fixed image (RAS mm) lies in the moving image; identity when rejected.
        accepted: False when the search failed or made things worse; the header's geometry then holds.
        reason: why it was rejected; empty when accepted.
        information: normalised mutual information (Studholme 1999; 1 ... 2) before and after.
        overlap: Dice of the two heads' (or brains') foreground before and after.
        rotation_deg: angle of the rotation found.
        shift_mm: how far the centre of the fixed image moves.
    """

    matrix: np.ndarray
    accepted: bool
    reason: str
    information: tuple[float, float]
    overlap: tuple[float, float]
    rotation_deg: float
    shift_mm: float


def register_rigid(fixed: Volume, moving: Volume, *, seed: int = 0) -> Registration:
    """Find the rigid motion that brings `moving` onto `fixed`.

    The search starts from the headers' geometry and from aligned centres of mass, follows the better one from coarse
    to fine, and is repeatable: one thread, one seed. It never raises for images that don't fit: the result says so.

    Args:
        fixed: the image that stays.
        moving: another contrast of the same head.
        seed: of the random sample of voxels that the metric looks at.
    """
    fixed_small, moving_small = (_working_copy(volume, WORKING_MM) for volume in (fixed, moving))
    try:
        with _one_thread():
            matrix = _search(fixed_small, moving_small, seed)
    except RuntimeError as error:  # ITK's exceptions: no overlap, too few samples
        return _judge(fixed_small, moving_small, np.eye(4), f"the search failed ({_last_line(error)})")
    return _judge(fixed_small, moving_small, matrix, "")


def foreground(array: np.ndarray) -> np.ndarray:
    """Return the head in an image, or the brain where the skull (or the air's noise) was set to zero."""
    positive = array > 0
    if positive.mean() < 0.5:
        return positive
    otsu = sitk.OtsuThresholdImageFilter()
    otsu.Execute(sitk.GetImageFromArray(np.ascontiguousarray(array, dtype=np.float32)))
    return array > 0.5 * otsu.GetThreshold()


def normalized_mutual_information(first: np.ndarray, second: np.ndarray, bins: int = 48) -> float:
    """Return (H(a) + H(b)) / H(a, b) of two equally shaped arrays: 1 = independent, 2 = one tells the other."""
    edges = [np.unique(np.quantile(values, np.linspace(0, 1, bins + 1))) for values in (first, second)]
    if min(len(edge) for edge in edges) < 3:
        return 1.0
    joint = np.histogram2d(first.ravel(), second.ravel(), bins=edges)[0]
    return (_entropy(joint.sum(axis=1)) + _entropy(joint.sum(axis=0))) / max(_entropy(joint), 1e-9)


def _search(fixed: Volume, moving: Volume, seed: int) -> np.ndarray:
    """Return the best motion as a matrix (fixed RAS mm -> moving RAS mm)."""
    images = _to_sitk(fixed), _to_sitk(moving)
    mask = sitk.GetImageFromArray(ndimage.binary_dilation(foreground(fixed.array), iterations=4).T.astype(np.uint8))
    mask.CopyInformation(images[0])
    centre = _centre_of_mass(fixed)
    starts, failures = [], []
    for shift in (np.zeros(3), _centre_of_mass(moving) - centre):
        transform = sitk.Euler3DTransform()
        transform.SetCenter((_TO_LPS[:3, :3] @ centre).tolist())
        transform.SetTranslation((_TO_LPS[:3, :3] @ shift).tolist())
        method = _metric(mask, transform, seed, **_COARSE)
        method.SetOptimizerAsRegularStepGradientDescent(
            learningRate=2.0, minStep=1e-2, numberOfIterations=200, relaxationFactor=0.6
        )
        try:
            method.Execute(*images)
            starts.append((method.GetMetricValue(), transform))
        except RuntimeError as error:  # the headers may place the images where they don't meet
            failures.append(error)
    if not starts:
        raise failures[-1]
    _, transform = min(starts, key=lambda start: start[0])
    method = _metric(mask, transform, seed, **_FINE)
    # Thick slices make a narrow valley of the metric, in which gradient descent stops 1 to 2 mm short.
    method.SetOptimizerAsPowell(numberOfIterations=5, maximumLineIterations=20, stepLength=0.5, stepTolerance=1e-2)
    method.Execute(*images)
    return _to_matrix(transform)


def _metric(
    mask: sitk.Image, transform: sitk.Euler3DTransform, seed: int, *, shrink: int, smooth_mm: float, samples: float
) -> sitk.ImageRegistrationMethod:
    """Return a registration method for one resolution, without its optimiser, that works on `transform` in place."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(48)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(samples, seed + 1)
    method.SetMetricFixedMask(mask)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel([shrink])
    method.SetSmoothingSigmasPerLevel([smooth_mm])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    return method


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let ITK work in one thread: with more, sums end in another order each time and so do the last bits.

    The method's own `SetNumberOfThreads` does not reach its metric; only ITK's default for the whole process does.
    """
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def _judge(fixed: Volume, moving: Volume, matrix: np.ndarray, failure: str) -> Registration:
    """Compare the fit with that of the headers, and fall back to them when it is worse or impossible.

    A fit that tells something is much better than those of the image displaced by `_DISPLACED_MM`: noise fits equally
    badly everywhere.
    """
    fixed, moving = (_working_copy(volume, _JUDGING_MM) for volume in (fixed, moving))
    before, after = (_fit(fixed, moving, motion) for motion in (np.eye(4), matrix))
    rotation, shift = _size(matrix, fixed)
    if after[0] <= before[0] and rotation < _SAME_ROTATION_DEG and shift < _SAME_SHIFT_MM:
        matrix, after, rotation, shift = np.eye(4), before, 0.0, 0.0  # the headers had it right
    displaced = max(_fit(fixed, moving, _shifted(matrix, axis, side))[0] for axis in range(3) for side in (-1, 1))
    reason = failure
    if not reason and (rotation > _LARGEST_ROTATION_DEG or shift > _LARGEST_SHIFT_MM):
        reason = f"the motion found is implausible ({rotation:.0f} degrees, {shift:.0f} mm)"
    elif not reason and after[0] - 1 <= _DISTINCT * (displaced - 1):
        reason = "the two images have nothing in common"
    elif not reason and after[0] < before[0]:
        reason = "mutual information fell"
    elif not reason and after[1] < before[1] - 0.05:
        reason = "the overlap of the two heads fell"
    return Registration(
        matrix=np.eye(4) if reason else matrix,
        accepted=not reason,
        reason=reason,
        information=(before[0], after[0]),
        overlap=(before[1], after[1]),
        rotation_deg=rotation,
        shift_mm=shift,
    )


def _size(matrix: np.ndarray, fixed: Volume) -> tuple[float, float]:
    """Return a motion's angle in degrees, and by how many mm it moves the centre of the head."""
    cosine = (np.trace(matrix[:3, :3]) - 1) / 2
    centre = np.append(_centre_of_mass(fixed), 1.0)
    return math.degrees(math.acos(float(np.clip(cosine, -1, 1)))), float(np.linalg.norm((matrix @ centre - centre)[:3]))


def _shifted(matrix: np.ndarray, axis: int, side: int) -> np.ndarray:
    shifted = matrix.copy()
    shifted[axis, 3] += side * _DISPLACED_MM
    return shifted


def _fit(fixed: Volume, moving: Volume, matrix: np.ndarray) -> tuple[float, float]:
    """Return normalised mutual information within the fixed foreground, and the Dice of the foregrounds.

    Only what the moving image's field of view covers is counted for the Dice.
    """
    moved = resample_onto(moving, fixed, matrix).array
    covered = resample_onto(moving.with_array(np.ones_like(moving.array)), fixed, matrix).array > 0.5
    theirs = resample_onto(moving.with_array(foreground(moving.array)), fixed, matrix).array > 0.5
    ours = foreground(fixed.array) & covered
    if ours.sum() < 100:
        return 1.0, 0.0
    region = ndimage.binary_dilation(ours, iterations=2)
    overlap = 2 * float((ours & theirs).sum()) / max(float(ours.sum() + theirs.sum()), 1.0)
    return normalized_mutual_information(fixed.array[region], moved[region]), overlap


def _working_copy(volume: Volume, voxel_mm: float) -> Volume:
    """Return the image with isotropic voxels on its own axes, NaN and negative values set to 0."""
    spacing = np.array(volume.spacing)
    extent = spacing * volume.array.shape
    shape = np.maximum(np.ceil(extent / voxel_mm).astype(int), 2)
    scale = voxel_mm / spacing
    affine = volume.affine.copy()
    affine[:3, :3] = volume.affine[:3, :3] * scale
    affine[:3, 3] = volume.affine[:3, 3] + volume.affine[:3, :3] @ (scale / 2 - 0.5)
    clean = volume.with_array(np.clip(np.nan_to_num(volume.array, posinf=0, neginf=0), 0, None))
    grid = Volume(np.broadcast_to(np.float32(0), tuple(shape)), affine)
    image = resample_onto(clean, grid, order=3)
    high = np.percentile(image.array[image.array > 0], 99.8) if (image.array > 0).any() else 1.0
    return image.with_array(np.clip(image.array / max(high, 1e-9), 0, 1))


def _to_sitk(volume: Volume) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array.T))
    affine = _TO_LPS @ volume.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    return image


def _to_matrix(transform: sitk.Euler3DTransform) -> np.ndarray:
    """Return an ITK transform (LPS) as a matrix on RAS points."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    matrix[:3, 3] = transform.TransformPoint((0.0, 0.0, 0.0))
    return _TO_LPS @ matrix @ _TO_LPS


def _centre_of_mass(volume: Volume) -> np.ndarray:
    """Return the centre of the foreground in RAS mm."""
    mask = foreground(volume.array)
    index = ndimage.center_of_mass(mask) if mask.any() else (np.array(volume.array.shape) - 1) / 2
    return (volume.affine @ np.append(index, 1.0))[:3]


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
