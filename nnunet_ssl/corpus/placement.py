"""Which scans of a session lie in one place, and the grid that they share. Pure functions of what a first look found.

Scans that agree share a grid, so that a patch of the one shows what the same patch of the other shows: they can make
pairs. A scan that agrees with no other one keeps its own grid: it cuts none of the others, and none cuts it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Generic, TypeVar

import numpy as np
from nibabel.affines import apply_affine
from scipy.sparse.csgraph import connected_components

from nnunet_ssl.imaging.geometry import Volume, canonical
from nnunet_ssl.imaging.registration import agreement, foreground, judging_copy
from nnunet_ssl.imaging.skull_strip import looks_stripped
from nnunet_ssl.limits import AS_WHOLE, MINIMUM_AGREEMENT, MINIMUM_FOREGROUND_KEPT, MUTUAL_COVERAGE

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a first look at a scan found.

    Attributes:
        stored: the grid of the file, its axes in the order of the file, without an image.
        grid: the same in RAS order.
        small: a copy with voxels of 3 mm.
        points: (N, 3), the foreground in RAS mm, one point every 3 mm.
        stripped: whether the skull is gone.
    """

    stored: Volume
    grid: Volume
    small: Volume
    points: np.ndarray
    stripped: bool

    @property
    def oriented(self) -> bool:
        """Whether the header says where the image lies."""
        return self.stored.oriented


@dataclass(frozen=True, kw_only=True)
class Group(Generic[Key]):
    """Scans that share a grid.

    Attributes:
        reference: the scan that gave the grid its voxels.
        grid: without an image.
        kept: each scan with the share of its foreground that lies on the grid.
    """

    reference: Key
    grid: Volume
    kept: dict[Key, float]


def look_at(volume: Volume, stripped: bool | None = None) -> Look:
    """Look at a scan as it was read; `stripped` None: tell by the image."""
    image = canonical(volume)
    small = judging_copy(image)
    if stripped is None:
        stripped = looks_stripped(volume.array, volume.voxel_ml * 1000)
    return Look(
        stored=volume.with_array(np.broadcast_to(np.float32(0), volume.array.shape)),
        grid=Volume.empty(image.array.shape, image.affine),
        small=small,
        points=apply_affine(small.affine, np.argwhere(foreground(small.array))),
        stripped=stripped,
    )


def best_reference(looks: Mapping[Key, Look]) -> Key:
    """Choose the scan whose voxels the others may share: the sharpest one of those that see most of the session.

    A scan of a small field of view, or of another part of the body, sees little of the others, however sharp it is.
    """
    seen = {
        key: float(np.mean([covered(other.points, look.grid) for other in looks.values()]))
        for key, look in looks.items()
    }
    whole = [key for key in looks if seen[key] >= AS_WHOLE * max(seen.values())]
    return min(whole, key=lambda key: looks[key].grid.voxel_ml)


def covered(points: np.ndarray, grid: Volume) -> float:
    """Return the share of points (N, 3), RAS mm, that lie in a grid's field of view; 1 if there are none."""
    index = apply_affine(np.linalg.inv(grid.affine), points)
    inside = ((index > -0.5) & (index < np.array(grid.array.shape) - 0.5)).all(axis=1)
    return float(inside.mean()) if len(points) else 1.0


def pair_agreements(looks: Mapping[Key, Look]) -> dict[tuple[Key, Key], float]:
    """Measure how well each pair of scans agrees; see :func:`nnunet_ssl.imaging.registration.agreement`."""
    return {(one, other): agreement(looks[one].small, looks[other].small) for one, other in combinations(looks, 2)}


def make_groups(looks: Mapping[Key, Look], agreements: Mapping[tuple[Key, Key], float]) -> list[Group[Key]]:
    """Put scans that agree, directly or through others, on one grid, and every other scan on its own.

    A scan that would lose more than a tenth of its foreground on the common grid keeps its own grid, too.
    """
    numbers = {key: number for number, key in enumerate(looks)}
    agree = np.zeros((len(looks), len(looks)), bool)
    for (one, other), value in agreements.items():
        agree[numbers[one], numbers[other]] = value >= MINIMUM_AGREEMENT
    _, component = connected_components(agree, directed=False)
    groups = []
    for label in range(component.max(initial=-1) + 1):
        members = {key: looks[key] for key in looks if component[numbers[key]] == label}
        reference, grid = _common_grid(members)
        kept = {key: covered(look.points, grid) for key, look in members.items()}
        losers = [key for key, share in kept.items() if share < MINIMUM_FOREGROUND_KEPT and key != reference]
        groups.append(Group(reference=reference, grid=grid, kept={key: kept[key] for key in kept if key not in losers}))
        groups += [Group(reference=key, grid=looks[key].grid, kept={key: 1.0}) for key in losers]
    return groups


def _common_grid(looks: Mapping[Key, Look]) -> tuple[Key, Volume]:
    """The grid of the best reference, widened to hold the foreground of every scan that shows as much of the head."""
    reference = best_reference(looks)
    grid, points = looks[reference].grid, looks[reference].points
    low, high = np.zeros(3), np.array(grid.array.shape) - 1.0
    for look in looks.values():
        if min(covered(points, look.grid), covered(look.points, grid)) >= MUTUAL_COVERAGE:
            index = apply_affine(np.linalg.inv(grid.affine), _corners(look))
            low, high = np.minimum(low, index.min(axis=0)), np.maximum(high, index.max(axis=0))
    low, high = np.floor(low + 0.1).astype(int), np.ceil(high - 0.1).astype(int)  # a tenth of a voxel is rounding
    affine = grid.affine.copy()
    affine[:3, 3] = apply_affine(grid.affine, low)
    return reference, Volume.empty(tuple(high - low + 1), affine)


def _corners(look: Look) -> np.ndarray:
    """The corners (8, 3), RAS mm, of the box that the voxels around a scan's foreground fill on its own grid."""
    index = apply_affine(np.linalg.inv(look.grid.affine), look.points)
    margin = 3.0 / np.array(look.grid.spacing)  # the points are 3 mm apart
    last = np.array(look.grid.array.shape) - 1
    low, high = (index.min(axis=0) - margin).clip(0, last), (index.max(axis=0) + margin).clip(0, last)
    return apply_affine(look.grid.affine, np.array(np.meshgrid(*zip(low, high))).reshape(3, -1).T)
