"""Which lesions of two masks meet: by any shared voxel, or one to one by their intersection over union.

One to one is how ISLES'26 counts, with panoptica 1.0.1 (Kofler et al., arXiv 2312.02608). That release keeps NumPy
below 2 and scikit-image at 0.22, so its rule is written out here; a test holds it to numbers that panoptica gave.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import cc3d
import numpy as np

Connectivity = Literal[6, 18, 26]
"""Neighbours of a voxel in three dimensions."""


@dataclass(frozen=True, kw_only=True)
class Overlaps:
    """The lesions of two masks and what they share, in voxels; a lesion's number is its place in its array.

    Attributes:
        reference: (R,) size of each reference lesion.
        predicted: (P,) size of each predicted lesion.
        pairs: (N, 2) numbers of the reference and the predicted lesion that share voxels, sorted by the predicted one.
        shared: (N,) how many voxels they share.
        peaks: (P,) the highest probability in each predicted lesion, if there was a map.
    """

    reference: np.ndarray
    predicted: np.ndarray
    pairs: np.ndarray
    shared: np.ndarray
    peaks: np.ndarray | None = None

    def keeping(self, kept: np.ndarray) -> Overlaps:
        """Return what is left when only the predicted lesions of a boolean (P,) are predicted."""
        remaining = kept[self.pairs[:, 1]]
        number = np.cumsum(kept) - 1
        pairs = self.pairs[remaining]
        return replace(
            self,
            predicted=self.predicted[kept],
            pairs=np.stack([pairs[:, 0], number[pairs[:, 1]]], axis=1),
            shared=self.shared[remaining],
            peaks=None if self.peaks is None else self.peaks[kept],
        )

    @property
    def found(self) -> int:
        """How many reference lesions share a voxel with the prediction."""
        return len(np.unique(self.pairs[:, 0]))

    @property
    def supported(self) -> int:
        """How many predicted lesions share a voxel with the reference."""
        return len(np.unique(self.pairs[:, 1]))


def find_overlaps(
    reference: np.ndarray,
    predicted: np.ndarray,
    connectivity: Connectivity,
    probabilities: np.ndarray | None = None,
) -> Overlaps:
    """Take two boolean masks (X, Y, Z) apart into connected components of 6, 18 or 26 neighbours."""
    labels, sizes = zip(*(components(mask, connectivity) for mask in (reference, predicted)))
    both = reference & predicted
    first, second = (each[both].astype(np.int64) - 1 for each in labels)
    codes, shared = np.unique(second * len(sizes[0]) + first, return_counts=True)
    pairs = np.stack([codes % max(len(sizes[0]), 1), codes // max(len(sizes[0]), 1)], axis=1)
    peaks = None if probabilities is None else peaks_of(probabilities, labels[1], len(sizes[1]))
    return Overlaps(reference=sizes[0], predicted=sizes[1], pairs=pairs, shared=shared, peaks=peaks)


def count_matches(overlaps: Overlaps, threshold: float) -> int:
    """Return how many lesions match one to one, pairs of the highest intersection over union first.

    Args:
        overlaps: of a reference and a prediction.
        threshold: pairs of a lower intersection over union do not match.
    """
    union = overlaps.reference[overlaps.pairs[:, 0]] + overlaps.predicted[overlaps.pairs[:, 1]] - overlaps.shared
    ratio = overlaps.shared / union
    taken: tuple[set[int], set[int]] = set(), set()
    matches = 0
    for number in np.argsort(-ratio, kind="stable"):  # of equal ones, the first comes first, as in panoptica
        pair = overlaps.pairs[number]
        if ratio[number] >= threshold and pair[0] not in taken[0] and pair[1] not in taken[1]:
            matches += 1
            for lesion, others in zip(pair, taken):
                others.add(int(lesion))
    return matches


def components(mask: np.ndarray, connectivity: Connectivity) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each voxel's component from 1, (X, Y, Z), and the components' sizes, int64."""
    labels, count = cc3d.connected_components(mask, connectivity=connectivity, return_N=True)
    return labels, np.bincount(labels[mask], minlength=count + 1)[1:]


def peaks_of(probabilities: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Return the highest probability in each of the components 1 ... `count`."""
    inside = labels > 0
    peaks = np.zeros(count, dtype=probabilities.dtype)
    np.maximum.at(peaks, labels[inside].astype(np.int64) - 1, probabilities[inside])  # SciPy's would sort all voxels
    return peaks
