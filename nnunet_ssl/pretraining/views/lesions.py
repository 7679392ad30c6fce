"""Synthetic lesions: irregular blobs of a kind, drawn by seed, step and place, put into views on the training device.

A lesion is a shape, a size and a kind, which it keeps in whatever head it is put. Where it lies and whether it is
brighter or darker than what it replaces belong to the view. It lies inside the brain with every voxel, and no voxel
beside its own changes by a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_ssl.pretraining.views.intensity import per_view
from nnunet_ssl.pretraining.views.sampling import LESIONS
from nnunet_ssl.pretraining.views.spatial import unravelled
from nnunet_ssl.pretraining.views.transfer import send

KINDS = {"cavity": (0.1, 1.0), "tissue": (0.3, 0.5), "blurred": (1.0, 0.0)}
"""Of each kind: how deep its edge is, as a share of the way to its middle, and how much of the texture it replaces is
gone. A cavity is sharp and even, as old infarcts are; a blurred one fades out and lets the tissue's texture through, as
a dysplasia does."""

COARSE = 4
"""Random numbers along each axis that make a shape irregular: its bumps are about a third of it."""
STRETCH, BUMPS = 0.2, 0.35
"""Standard deviations of the logarithm of each axis' length, and of the radius over its mean."""
REACH = 0.75
"""Half of the side of a lesion's box, in diameters."""


@dataclass(frozen=True, kw_only=True)
class LesionRanges:
    """Between what lesions are drawn."""

    diameter: tuple[float, float]  # voxels, of the ball of the same volume; its logarithm is uniform
    contrast: tuple[float, float]  # change of the mean, in standard deviations of the view's brain; uniform
    opposite: float  # how often the second head's lesion is dark where the first one's is bright, or the reverse


@dataclass(frozen=True, kw_only=True)
class Lesions:
    """Lesions that were drawn, each for two views; on the CPU.

    Views are numbered as in ``Examples.paired_views``: lesion i is in view i and in another one of the second half.
    """

    half: int  # voxels from the middle of a box to its faces; every box holds the largest lesion that could be drawn
    coarse: np.ndarray  # (L, COARSE, COARSE, COARSE) of the shape
    stretch: np.ndarray  # (L, 3) factor of each axis
    diameter: np.ndarray  # (L,) voxels
    kind: np.ndarray  # (L,) places in KINDS
    of_view: np.ndarray  # (2 L,) the lesion of each view
    where: np.ndarray  # (2 L,) uniform in [0, 1): the place among all that a view has for its lesion
    contrast: np.ndarray  # (2 L,) standard deviations, negative where it is darker

    @property
    def second(self) -> np.ndarray:
        """The number of the other view of each lesion, (L,)."""
        return np.argsort(self.of_view[len(self.kind) :]) + len(self.kind)


def draw_lesions(views: int, ranges: LesionRanges, *, seed: int, step: int, places: Sequence[int]) -> Lesions:
    """Draw the lesions of a batch's views.

    A lesion's numbers follow from the place of the example in the whole batch that has it first, and where it lies from
    the place of the example that it is put into; so they are the same for one seed in whichever process. Which example
    has it, too, is the next one of the same process and part.

    Args:
        views: of each example, 1 or 2.
        ranges: of sizes and contrasts.
        seed: of the run.
        step: of the training.
        places: of the examples in the whole batch, over all processes and parts; at least two.
    """
    count = views * len(places) // 2
    by_view = [(place, view) for view in range(views) for place in places]
    of_lesion = [np.random.default_rng([seed, LESIONS, step, place, 0]) for place, _ in by_view[:count]]
    of_head = [np.random.default_rng([seed, LESIONS, step, place, 1 + view]) for place, view in by_view[: 2 * count]]
    low, high = np.log(ranges.diameter)
    drawn = [
        (
            rng.standard_normal((COARSE,) * 3),
            np.exp(rng.normal(0, STRETCH, 3)),
            np.exp(rng.uniform(low, high)),
            rng.integers(len(KINDS)),
            1 if rng.random() < 0.5 else -1,
            -1 if rng.random() < ranges.opposite else 1,
        )
        for rng in of_lesion
    ]
    coarse, stretch, diameter, kind, sign, opposite = (np.array(column) for column in zip(*drawn))
    of_view = np.concatenate([np.arange(count), np.roll(np.arange(count), 1)])
    signs = sign[of_view] * np.where(np.arange(2 * count) < count, 1, opposite[of_view])
    return Lesions(
        half=int(np.ceil(REACH * ranges.diameter[1])),
        coarse=coarse,
        stretch=stretch,
        diameter=diameter,
        kind=kind,
        of_view=of_view,
        where=np.array([rng.random() for rng in of_head]),
        contrast=signs * np.array([rng.uniform(*ranges.contrast) for rng in of_head]),
    )


@torch.no_grad()
def lesion_shapes(lesions: Lesions, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the lesions look like, each in the middle of a box of K = 2 half + 1 voxels.

    Returns:
        (L, K, K, K) bool, the voxels of each; and (L, K, K, K) float32 from 0 to 1, how much of its contrast each has,
        which is 0 outside.
    """
    numbers = np.concatenate([lesions.stretch, lesions.diameter[:, None]], axis=1).astype(np.float32)
    stretch, diameter = send(torch.from_numpy(numbers), device).view(-1, 1, 1, 1, 4).split([3, 1], dim=-1)
    line = torch.arange(-lesions.half, lesions.half + 1, dtype=torch.float32, device=device)
    offset = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), dim=-1) / (REACH * diameter)
    coarse = send(torch.from_numpy(lesions.coarse.astype(np.float32)), device)[:, None]
    bumps = F.grid_sample(coarse, offset.flip(-1), padding_mode="border", align_corners=True)[:, 0]
    radius = 2 * REACH * (offset / stretch).norm(dim=-1) + BUMPS * bumps  # about 1 at the surface

    volume = np.maximum(1, np.round(np.pi / 6 * lesions.diameter**3)).astype(np.int64)
    ordered = radius.flatten(1).sort(dim=1).values
    surface = ordered.gather(1, send(torch.from_numpy(volume - 1), device)[:, None]).view(-1, 1, 1, 1)
    inside = radius <= surface
    deepest = ordered[:, 0].view(-1, 1, 1, 1)
    depth = (surface - radius) / (surface - deepest).clamp_min(1e-6)
    edge = per_view([list(KINDS.values())[kind][0] for kind in lesions.kind], radius)
    return inside, ((depth + 0.1) / (edge + 0.1)).clamp(max=1) * inside


@dataclass(frozen=True, kw_only=True)
class Lesioned:
    """Views with lesions."""

    views: Tensor  # (N, 1, X, Y, Z)
    masks: Tensor  # (N, 1, X, Y, Z) bool, the lesion's voxels; none where it found no place
    placed: Tensor  # (N,) bool


@torch.no_grad()
def put(lesions: Lesions, views: Tensor, brain: Tensor) -> Lesioned:
    """Put each view's lesion into it.

    Lesions change the mean of what they replace by their contrast, and let as much of its texture stay as their kind
    does. A view without room for its lesion is returned as it is.

    Args:
        lesions: one for each view.
        views: (N, 1, X, Y, Z).
        brain: (N, 1, X, Y, Z) bool.
    """
    with torch.autocast(views.device.type, enabled=False):
        shapes, weights = lesion_shapes(lesions, views.device)
        of_view = send(torch.from_numpy(lesions.of_view), views.device)
        mask, weight = shapes.index_select(0, of_view), weights.index_select(0, of_view)
        corner, placed = _places(mask, brain[:, 0], lesions.where)
        box = _box(corner, mask.shape[1:], views.shape[2:])
        mask = mask.flatten(1) & placed[:, None]

        tissue = views.flatten(1).gather(1, box)
        mean = (tissue * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp_min(1)
        texture_gone = [list(KINDS.values())[lesions.kind[one]][1] for one in lesions.of_view]
        change = per_view(texture_gone, views)[:, :, 0, 0] * (mean - tissue)
        change = change + per_view(lesions.contrast.tolist(), views)[:, :, 0, 0] * _spread(views, brain)
        lesion = torch.where(mask, tissue + weight.flatten(1) * change, tissue)
        return Lesioned(
            views=views.flatten(1).scatter(1, box, lesion).view(views.shape),
            masks=torch.zeros_like(brain).flatten(1).scatter(1, box, mask).view(brain.shape),
            placed=placed,
        )


def _places(mask: Tensor, brain: Tensor, where: np.ndarray) -> tuple[Tensor, Tensor]:
    """The first voxel (N, 3) of each view's box such that the lesion in it lies in the brain, and whether there is one.

    Overlaps of a lesion with what is not brain are counted for all its places at once, by Fourier transforms.
    """
    size = brain.shape[1:]
    outside = torch.fft.rfftn((~brain).float(), dim=(1, 2, 3))
    lesion = torch.fft.rfftn(mask.float(), s=size, dim=(1, 2, 3))
    overlap = torch.fft.irfftn(outside * lesion.conj(), s=size, dim=(1, 2, 3))
    starts = [length - box + 1 for length, box in zip(size, mask.shape[1:])]
    free = (overlap[:, : starts[0], : starts[1], : starts[2]] < 0.5).flatten(1)
    count = free.sum(dim=1)
    chosen = (
        (send(torch.from_numpy(where.astype(np.float32)), brain.device) * count)
        .long()
        .clamp_max((count - 1).clamp_min(0))
    )
    index = torch.searchsorted(free.cumsum(dim=1), (chosen + 1)[:, None])[:, 0].clamp_max(free.shape[1] - 1)
    return unravelled(index, starts), count > 0


def _box(corner: Tensor, box: Sequence[int], size: Sequence[int]) -> Tensor:
    """The places (N, K^3) of a box's voxels in a flattened view."""
    index = torch.zeros(len(corner), 1, 1, 1, dtype=torch.long, device=corner.device)
    for axis, (side, length) in enumerate(zip(box, size)):
        shape = [len(corner), *(side if each == axis else 1 for each in range(3))]
        index = index * length + (corner[:, axis, None] + torch.arange(side, device=corner.device)).view(shape)
    return index.flatten(1)


def _spread(views: Tensor, brain: Tensor) -> Tensor:
    """The standard deviation of each view's brain, (N, 1)."""
    values, inside = views.flatten(1), brain.flatten(1)
    count = inside.sum(dim=1, keepdim=True).clamp_min(1)
    mean = (values * inside).sum(dim=1, keepdim=True) / count
    return ((values - mean).square() * inside).sum(dim=1, keepdim=True).div(count).sqrt()
