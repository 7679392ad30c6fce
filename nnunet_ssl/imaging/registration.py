"""Rigid registration of two contrasts of one head: multi-resolution mutual information (SimpleITK), with a check."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial.transform import Rotation

from nnunet_ssl.imaging.geometry import Volume, resample_onto
from nnunet_ssl.imaging.metaimage import TO_LPS, to_sitk
from nnunet_ssl.limits import MINIMUM_AGREEMENT

WORKING_MM = 1.5
"""Both images are brought to isotropic voxels of this size for the search; the result is finer than a voxel."""

_JUDGING_MM = 3.0
_DISPLACED_MM = 15.0
_TURNED_DEG = (15.0, 45.0)
_JUDGED_VOXELS = 30_000
_FEWEST_VOXELS = 300
_VOXELS_PER_BIN = 8
_LARGEST_SHIFT_MM = 250.0
_SAME_ROTATION_DEG = 2.0
_SAME_SHIFT_MM = 2.0
_LARGEST_ROTATION_DEG = 60.0


class Level(NamedTuple):
    """A resolution at which the search looks at the images, and the share of their voxels that it compares."""

    shrink: int
    smooth_mm: float
    samples: float


_COARSE = Level(shrink=4, smooth_mm=6.0, samples=0.5)
_FINE = Level(shrink=2, smooth_mm=1.5, samples=0.3)


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
    fixed_small, moving_small = (working_copy(volume, WORKING_MM) for volume in (fixed, moving))
    try:
        with one_thread():
            matrix = _search(fixed_small, moving_small, seed)
    except RuntimeError as error:  # ITK's exceptions: no overlap, too few samples
        return _judge(fixed_small, moving_small, np.eye(4), f"the search failed ({_last_line(error)})")
    return _judge(fixed_small, moving_small, matrix, "")


def judging_copy(volume: Volume) -> Volume:
    """Return a copy with voxels of 3 mm, small enough to be kept and compared often; see :func:`agreement`."""
    return working_copy(volume, _JUDGING_MM, order=1)


def agreement(fixed: Volume, moving: Volume, matrix: np.ndarray | None = None) -> float:
    """Tell how much better two images of one head fit where they lie than displaced a little.

    Noise and images of different places fit equally badly everywhere, and images that lie centimetres apart fit better
    once one of them is displaced.

    Args:
        fixed: as :func:`judging_copy` gives it.
        moving: likewise.
        matrix: (4, 4), fixed RAS mm -> moving RAS mm; None = the headers' geometry.

    Returns:
        The mutual information (normalised, minus 1) within the smaller one's foreground, divided by the highest of what
        is left of it by a displacement of 15 mm, or a turn by 15 degrees (more in an object smaller than a head), along
        or about each axis. Around 1 and below: nothing says that the images lie well; see
        :data:`nnunet_ssl.limits.MINIMUM_AGREEMENT`. 0 where they do not meet.
    """
    matrix = np.eye(4) if matrix is None else matrix
    masks = foreground(fixed.array), foreground(moving.array)
    if masks[1].sum() < masks[0].sum():  # else the skull of the one would be compared with the nothing of the other
        fixed, moving, masks, matrix = moving, fixed, masks[::-1], np.linalg.inv(matrix)
    voxels = np.argwhere(ndimage.binary_dilation(masks[0], iterations=2))
    voxels = voxels[:: max(1, len(voxels) // _JUDGED_VOXELS)]
    values, points = fixed.array[tuple(voxels.T)], nib.affines.apply_affine(fixed.affine, voxels)
    bins = int(np.clip(math.sqrt(len(points) / _VOXELS_PER_BIN), 8, 48))  # few voxels in many bins always seem alike

    def information(motion: np.ndarray) -> float:
        places = nib.affines.apply_affine(np.linalg.inv(moving.affine) @ motion, points)
        covered = ((places > -0.5) & (places < np.array(moving.array.shape) - 0.5)).all(axis=1)
        if covered.sum() < _FEWEST_VOXELS:
            return 0.0
        moved = ndimage.map_coordinates(moving.array, places[covered].T, order=1, mode="nearest")
        return normalized_mutual_information(values[covered], moved, bins) - 1

    here = information(matrix)
    away = max(information(matrix @ displacement) for displacement in _displacements(points))
    return here / max(away, 1e-6) if here > 0 else 0.0


def _displacements(points: np.ndarray) -> Iterator[np.ndarray]:
    """Shifts along each axis and turns about it, to both sides, of an object of points (N, 3); (4, 4), RAS mm."""
    centre = points.mean(axis=0)
    radius = np.sqrt(((points - centre) ** 2).sum(axis=1).mean())
    degrees = np.clip(np.degrees(_DISPLACED_MM / radius), *_TURNED_DEG)
    for direction in (*np.eye(3), *-np.eye(3)):
        shift = np.eye(4)
        shift[:3, 3] = _DISPLACED_MM * direction
        yield shift
        turn = np.eye(4)
        turn[:3, :3] = Rotation.from_rotvec(degrees * direction, degrees=True).as_matrix()
        turn[:3, 3] = centre - turn[:3, :3] @ centre
        yield turn


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
    images = to_sitk(fixed), to_sitk(moving)
    mask = sitk.GetImageFromArray(ndimage.binary_dilation(foreground(fixed.array), iterations=4).T.astype(np.uint8))
    mask.CopyInformation(images[0])
    centre = _centre_of_mass(fixed)
    starts, failures = [], []
    for shift in (np.zeros(3), _centre_of_mass(moving) - centre):
        transform = sitk.Euler3DTransform()
        transform.SetCenter((TO_LPS[:3, :3] @ centre).tolist())
        transform.SetTranslation((TO_LPS[:3, :3] @ shift).tolist())
        method = mutual_information(mask, transform, seed, _COARSE)
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
    method = mutual_information(mask, transform, seed, _FINE)
    # Thick slices make a narrow valley of the metric, in which gradient descent stops 1 to 2 mm short.
    method.SetOptimizerAsPowell(numberOfIterations=5, maximumLineIterations=20, stepLength=0.5, stepTolerance=1e-2)
    method.Execute(*images)
    return to_matrix(transform)


def mutual_information(
    mask: sitk.Image, transform: sitk.Transform, seed: int, level: Level
) -> sitk.ImageRegistrationMethod:
    """Return a registration method for one resolution, without its optimiser, that works on `transform` in place."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(48)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(level.samples, seed + 1)
    method.SetMetricFixedMask(mask)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel([level.shrink])
    method.SetSmoothingSigmasPerLevel([level.smooth_mm])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    return method


@contextmanager
def one_thread() -> Iterator[None]:
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
    """Compare the fit with that of the headers, and fall back to them when it is worse or impossible."""
    fixed, moving = judging_copy(fixed), judging_copy(moving)
    before, after = (_fit(fixed, moving, motion) for motion in (np.eye(4), matrix))
    rotation, shift = _size(matrix, fixed)
    if after[0] <= before[0] and rotation < _SAME_ROTATION_DEG and shift < _SAME_SHIFT_MM:
        matrix, after, rotation, shift = np.eye(4), before, 0.0, 0.0  # the headers had it right
    reason = failure
    if not reason and (rotation > _LARGEST_ROTATION_DEG or shift > _LARGEST_SHIFT_MM):
        reason = f"the motion found is implausible ({rotation:.0f} degrees, {shift:.0f} mm)"
    elif not reason and agreement(fixed, moving, matrix) < MINIMUM_AGREEMENT:
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


def working_copy(volume: Volume, voxel_mm: float, order: int = 3) -> Volume:
    """Return the image with isotropic voxels on its own axes, NaN and negative values set to 0."""
    spacing = np.array(volume.spacing)
    extent = spacing * volume.array.shape
    shape = np.maximum(np.ceil(extent / voxel_mm).astype(int), 2)
    scale = voxel_mm / spacing
    affine = volume.affine.copy()
    affine[:3, :3] = volume.affine[:3, :3] * scale
    affine[:3, 3] = volume.affine[:3, 3] + volume.affine[:3, :3] @ (scale / 2 - 0.5)
    clean = volume.with_array(np.clip(np.nan_to_num(volume.array, posinf=0, neginf=0), 0, None))
    image = resample_onto(clean, Volume.empty(shape, affine), order=order)
    high = np.percentile(image.array[image.array > 0], 99.8) if (image.array > 0).any() else 1.0
    return image.with_array(np.clip(image.array / max(high, 1e-9), 0, 1))


def to_matrix(transform: sitk.Euler3DTransform | sitk.AffineTransform) -> np.ndarray:
    """Return an ITK transform (LPS) as a matrix on RAS points."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    matrix[:3, 3] = transform.TransformPoint((0.0, 0.0, 0.0))
    return TO_LPS @ matrix @ TO_LPS


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
