"""Masked image modelling: hide cells of the bottleneck grid, reconstruct the intensities of their voxels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_ssl.architectures.masking import expand_mask


def bottleneck_grid(patch_size: Sequence[int], stride: int) -> tuple[int, ...]:
    """Cells of the bottleneck along each axis: (3, 3, 3) for 96^3 at stride 32."""
    return tuple(math.ceil(size / stride) for size in patch_size)


def draw_masks(count: int, grid: Sequence[int], ratio: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Draw which cells are hidden: for each view a share uniform in `ratio`, then that many cells at random.

    Shares are rounded to whole cells, and at least one cell stays hidden and one visible.

    Returns:
        (count, *grid) bool on the CPU, True where a cell is hidden.
    """
    cells = math.prod(grid)
    low, high = ratio
    share = low + (high - low) * torch.rand(count, generator=generator)
    hidden = (share * cells).round().clamp(1, cells - 1)
    rank = torch.rand(count, cells, generator=generator).argsort(dim=1).argsort(dim=1)
    return (rank < hidden[:, None]).reshape(count, *grid)


def reconstruction_error(prediction: Tensor, target: Tensor, mask: Tensor, stride: int) -> Tensor:
    """Mean squared error over the hidden voxels of each view.

    Args:
        prediction: (B, 1, X, Y, Z).
        target: (B, 1, X, Y, Z).
        mask: (B, *grid) bool, True where a cell is hidden.
        stride: voxels per cell along each axis.

    Returns:
        (B,) float32.
    """
    hidden = voxel_mask(mask, target.shape[2:], stride)
    squared = (prediction.float() - target.float()).square()
    return (squared * hidden).sum(dim=(1, 2, 3, 4)) / hidden.sum(dim=(1, 2, 3, 4))


def error_of_the_mean(target: Tensor, mask: Tensor, stride: int) -> Tensor:
    """The error (B,) of a prediction that knows no more than the mean of each view's hidden voxels: their variance."""
    hidden = voxel_mask(mask, target.shape[2:], stride)
    count = hidden.sum(dim=(2, 3, 4), keepdim=True)
    mean = (target.float() * hidden).sum(dim=(2, 3, 4), keepdim=True) / count
    return reconstruction_error(mean.expand_as(target), target, mask, stride)


def voxel_mask(mask: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """Bring a mask (B, *grid) to the voxels: (B, 1, *size)."""
    return expand_mask(mask, size, stride)[:, None]
