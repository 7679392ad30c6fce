"""What a rater marks who sees a single contrast: not where a lesion is, but where that scan shows it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from nnunet_ssl.phantom.acquisition import Quality, ScanGrid, acquire, noise_of, noiseless, resample_onto_scan
from nnunet_ssl.phantom.anatomy import Anatomy

CONTRAST_TO_NOISE = 5.0
"""How far above the noise a voxel is seen for sure: the criterion of Rose (J. Opt. Soc. Am. 38, 196, 1948)."""

REACH_MM = 4.0
"""A rater does not mark what is further from the lesion than this, however far slices and interpolation spread it."""


def visible_lesion(
    healthy: Anatomy,
    diseased: Anatomy,
    truth: np.ndarray,
    modality: str,
    quality: Quality,
    rng: np.random.Generator,
    grid: ScanGrid,
    *,
    contrast_to_noise: float = CONTRAST_TO_NOISE,
) -> np.ndarray:
    """Return the mask that a rater draws on one scan of a head with a lesion.

    A voxel is seen where the signal, without noise but with the scan's own protocol, texture, slices and grid, differs
    from that of the same head without the lesion by `contrast_to_noise` standard deviations of the scan's noise. The
    rater's hand smooths the outline, which drops single voxels, and fills holes. Each step keeps the order of sets: of
    two scans that differ in noise alone, the noisier one's mask lies within the other's.

    Args:
        healthy: the head without the lesion.
        diseased: the head with it.
        truth: bool (X, Y, Z) on the heads' grid, the lesion as it is.
        modality: of the scan.
        quality: of the scan; the standard deviation of its noise is in units of grey matter (adc: 1e-3 mm2/s).
        rng: in the state in which :func:`~nnunet_ssl.phantom.acquisition.acquire` is going to be called with it; it
            stays in that state, so that a scan is the same whoever annotates it.
        grid: of the scan, in the heads' coordinates.
        contrast_to_noise: see above.

    Returns:
        bool (X, Y, Z) on `grid`.
    """
    if not truth.any():
        return np.zeros(grid.shape, dtype=bool)
    before, after = (noiseless(head, modality, quality, copy.deepcopy(rng), grid) for head in (healthy, diseased))
    seen = np.abs(after - before) > contrast_to_noise * noise_of(modality, quality)
    drawn = ndimage.gaussian_filter(seen.astype(np.float32), 0.5) > 0.5
    near = ndimage.distance_transform_edt(~truth, sampling=healthy.grid.spacing) <= REACH_MM
    return ndimage.binary_fill_holes(drawn) & (
        resample_onto_scan(near.astype(np.float32), healthy.grid.affine, grid) > 0
    )


@dataclass
class Annotated:
    """A head with a lesion that is scanned, and annotated on one of its scans.

    Attributes:
        healthy: the head without the lesion.
        anatomy: the head with it.
        truth: bool (X, Y, Z) on the heads' grid, the lesion as it is; empty for none.
        rater: the modality of the scan that the rater sees; None for the lesion as it is.
        contrast_to_noise: see :func:`visible_lesion`.
        drawn: the rater's mask, once the scan is made, and its grid.
    """

    healthy: Anatomy
    anatomy: Anatomy
    truth: np.ndarray
    rater: str | None = None
    contrast_to_noise: float = CONTRAST_TO_NOISE
    drawn: tuple[np.ndarray, ScanGrid] | None = None

    def acquire(self, modality: str, quality: Quality, rng: np.random.Generator, grid: ScanGrid) -> np.ndarray:
        """Scan the head, as :func:`nnunet_ssl.phantom.acquisition.acquire` does; the rater draws on the modality's."""
        if modality == self.rater:
            mask = visible_lesion(
                *(self.healthy, self.anatomy, self.truth, modality, quality, rng, grid),
                contrast_to_noise=self.contrast_to_noise,
            )
            self.drawn = mask, grid
        return acquire(self.anatomy, modality, quality, rng, grid)

    def true_on(self, grid: ScanGrid) -> np.ndarray:
        """Return the lesion as it is, bool on a scan's grid."""
        return _onto(self.truth, self.anatomy.grid.affine, grid)

    def drawn_on(self, grid: ScanGrid) -> np.ndarray:
        """Return the mask of the data set, bool on a scan's grid: the rater's, or without one the lesion as it is."""
        if self.rater is None:
            return self.true_on(grid)
        assert self.drawn is not None, f"the rater has not seen a {self.rater} scan"
        mask, seen_on = self.drawn
        return mask if seen_on is grid else _onto(mask, seen_on.affine, grid)


def _onto(mask: np.ndarray, affine: np.ndarray, grid: ScanGrid) -> np.ndarray:
    return resample_onto_scan(mask.astype(np.float32), affine, grid) > 0.5
