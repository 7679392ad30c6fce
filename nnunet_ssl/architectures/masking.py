"""Masks on the grid of an encoder's coarsest map: do they fit an input, and what do they hide on finer grids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def expand_mask(mask: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """Bring a mask (B, x, y, z) to a finer grid of `size`, each cell covering `stride` places along each axis."""
    for axis, length in enumerate(size, start=1):
        cell = torch.arange(length, device=mask.device) // stride
        mask = mask.index_select(axis, cell)
    return mask


def check_mask(mask: Tensor, x: Tensor, stride: int) -> None:
    """Refuse a mask that is not one of cells of `stride` voxels over x (B, C, X, Y, Z).

    Raises:
        ValueError: the mask has another shape than (B, ceil(X / stride), ceil(Y / stride), ceil(Z / stride)).
    """
    size = tuple(x.shape[2:])
    expected = (x.shape[0], *(-(-length // stride) for length in size))
    if tuple(mask.shape) != expected:
        raise ValueError(f"The mask has shape {tuple(mask.shape)}; for input of size {size} it is {expected}.")
