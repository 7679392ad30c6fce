"""Where the brain of a scan lies in MNI space: an affine map from the image alone, any contrast, with or without skull.

The template is the ICBM 2009a nonlinear symmetric T1 average (Fonov et al. 2011, doi 10.1016/j.neuroimage.2010.07.033),
brain only, averaged with its mirror image and resampled to 4 mm. Copyright (C) 1993-2009 Louis Collins, McConnell Brain
Imaging Centre, Montreal Neurological Institute, McGill University, which permits copies and changes with this notice.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnunet_ssl.imaging.geometry import Volume, canonical, read_volume
from nnunet_ssl.imaging.metaimage import TO_LPS, to_sitk
from nnunet_ssl.imaging.registration import (
    Level,
    foreground,
    mutual_information,
    one_thread,
    to_matrix,
    working_copy,
)

TEMPLATE = Path(__file__).with_name("mni152_4mm.nii.gz")

_WORKING_MM = 3.0
_CENTRE = np.array([0.0, -18.0, 10.0])  # about the middle of the brain
_SCALE = 0.92  # of a brain to the template's, which is larger than most
_SCALES = (0.75, 1.1)  # beyond these the scalp was taken for the brain, or a part for the whole
_TOP_MM = (65.0, 82.0)  # from the middle of the brain up to its top, and to the scalp
_COARSE = Level(shrink=1, smooth_mm=4.0, samples=0.4)
_FINE = Level(shrink=1, smooth_mm=2.0, samples=0.6)


@dataclass(frozen=True)
class Template:
    """The template and where its brain is, masks (X, Y, Z) on its grid; all are symmetric about the middle plane."""

    volume: Volume
    brain: np.ndarray
    inner: np.ndarray  # a voxel inside the brain's surface, where strippings agree


@functools.cache
def template() -> Template:
    """Read the template that comes with the package."""
    volume = read_volume(TEMPLATE)
    brain = ndimage.binary_fill_holes(ndimage.binary_opening(volume.array > 0))
    return Template(volume, brain, ndimage.binary_erosion(brain))


def locate_brain(scan: Volume, *, seed: int = 0) -> np.ndarray:
    """Return the affine map (4, 4) from MNI space to a scan, both in RAS mm.

    The search maximises mutual information within the template's brain, from the headers' place, the head's centre of
    mass and its top. Of a scan whose header says nothing of its orientation, all 24 are tried. It is repeatable.

    Raises:
        RuntimeError: the search failed, as it does on images without a brain.
    """
    moving = working_copy(canonical(scan), _WORKING_MM, order=1)
    images = to_sitk(template().volume), to_sitk(moving)
    mask = sitk.GetImageFromArray(ndimage.binary_dilation(template().brain).T.astype(np.uint8))
    mask.CopyInformation(images[0])
    turns = [np.eye(3)] if scan.oriented else list(_turns())
    found, failure = [], RuntimeError("no start")
    with one_thread():
        for turn, start in itertools.product(turns, _starts(moving, with_header=scan.oriented)):
            transform = sitk.Similarity3DTransform()
            transform.SetCenter((TO_LPS[:3, :3] @ _CENTRE).tolist())
            transform.SetMatrix((_SCALE * TO_LPS[:3, :3] @ turn @ TO_LPS[:3, :3]).ravel().tolist(), 1e-6)
            transform.SetTranslation((TO_LPS[:3, :3] @ (start - _CENTRE)).tolist())
            method = mutual_information(mask, transform, seed, _COARSE)
            method.SetOptimizerAsRegularStepGradientDescent(
                learningRate=2.0, minStep=5e-2, numberOfIterations=50, relaxationFactor=0.6
            )
            try:
                method.Execute(*images)
            except RuntimeError as error:  # a start where the images do not meet
                failure = error
                continue
            found.append((method.GetMetricValue(), transform))
        if not found:
            raise failure
        plausible = [one for one in found if _SCALES[0] < one[1].GetScale() < _SCALES[1]] or found
        _, coarse = min(plausible, key=lambda one: one[0])
        affine = sitk.AffineTransform(coarse.GetMatrix(), coarse.GetTranslation(), coarse.GetCenter())
        method = mutual_information(mask, affine, seed, _FINE)
        method.SetOptimizerAsRegularStepGradientDescent(
            learningRate=1.0, minStep=1e-2, numberOfIterations=100, relaxationFactor=0.6
        )
        method.Execute(*images)
    return to_matrix(affine)


def _starts(moving: Volume, *, with_header: bool) -> Iterator[np.ndarray]:
    """Guess where the middle of the brain lies in a scan, in RAS mm."""
    points = nib.affines.apply_affine(moving.affine, np.argwhere(foreground(moving.array)))
    if with_header:
        yield _CENTRE
    yield points.mean(axis=0)
    if with_header:
        top = np.percentile(points[:, 2], 99.5)
        upper = points[points[:, 2] > top - 110].mean(axis=0)  # without the neck
        yield from (np.array([upper[0], upper[1], top - height]) for height in _TOP_MM)


def _turns() -> Iterator[np.ndarray]:
    """The 24 turns of a cube."""
    for axes, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        turn = np.eye(3)[list(axes)] * np.array(signs)[:, None]
        if np.linalg.det(turn) > 0:
            yield turn
