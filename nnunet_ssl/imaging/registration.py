"""Rigid registration of two contrasts of one head: multi-resolution mutual information (SimpleITK), with a check."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnunet_ssl.imaging.geometry import Volume, resample_onto

WORKING_MM = 1.5
"""Both images are brought to isotropic voxels of this size for the search; the result is finer than a voxel."""

_SHRINK = (4, 2, 1)
_SMOOTH_MM = (6.0, 3.0, 0.0)
_SAMPLES = (0.5, 0.2, 0.1)
_LARGEST_SHIFT_MM = 100.0
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
    fixed_small, moving_small = (_working_copy(volume) for volume in (fixed, moving))
    try:
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
    starts = []
    for shift in (np.zeros(3), _centre_of_mass(moving) - centre):
        transform = sitk.Euler3DTransform()
        transform.SetCenter((_TO_LPS[:3, :3] @ centre).tolist())
        transform.SetTranslation((_TO_LPS[:3, :3] @ shift).tolist())
        starts.append(_optimise(*images, mask, transform, level=0, seed=seed))
    _, transform = min(starts, key=lambda start: start[0])
    for level in range(1, len(_SHRINK)):
        _, transform = _optimise(*images, mask, transform, level=level, seed=seed)
    return _to_matrix(transform)


def _optimise(
    fixed: sitk.Image, moving: sitk.Image, mask: sitk.Image, start: sitk.Euler3DTransform, *, level: int, seed: int
) -> tuple[float, sitk.Euler3DTransform]:
    """Run one resolution level; return the metric (negative mutual information) and the motion."""
    transform = sitk.Euler3DTransform(start)
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(48)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(_SAMPLES[level], seed + 1)
    method.SetMetricFixedMask(mask)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel([_SHRINK[level]])
    method.SetSmoothingSigmasPerLevel([_SMOOTH_MM[level]])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0 / 2**level, minStep=1e-3, numberOfIterations=200, relaxationFactor=0.6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    method.SetNumberOfThreads(1)
    method.Execute(fixed, moving)
    return method.GetMetricValue(), transform


def _judge(fixed: Volume, moving: Volume, matrix: np.ndarray, failure: str) -> Registration:
    """Compare the fit with that of the headers, and fall back to them when it is worse or impossible."""
    before, after = (_fit(fixed, moving, motion) for motion in (np.eye(4), matrix))
    cosine = (np.trace(matrix[:3, :3]) - 1) / 2
    rotation = math.degrees(math.acos(float(np.clip(cosine, -1, 1))))
    centre = np.append(_centre_of_mass(fixed), 1.0)
    shift = float(np.linalg.norm((matrix @ centre - centre)[:3]))
    reason = failure
    if not reason and (rotation > _LARGEST_ROTATION_DEG or shift > _LARGEST_SHIFT_MM):
        reason = f"the motion found is implausible ({rotation:.0f} degrees, {shift:.0f} mm)"
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


def _working_copy(volume: Volume) -> Volume:
    """Return the image with isotropic voxels of `WORKING_MM` on its own axes, NaN and negative values set to 0."""
    spacing = np.array(volume.spacing)
    extent = spacing * volume.array.shape
    shape = np.maximum(np.ceil(extent / WORKING_MM).astype(int), 2)
    scale = WORKING_MM / spacing
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
