"""FPNDecoder: a light feature pyramid and a voxel-shuffle head, for reconstruction and for segmentation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


def shuffle_voxels(x: Tensor, factor: int) -> Tensor:
    """Spread channels over space: (B, C * factor**3, X, Y, Z) to (B, C, factor * X, factor * Y, factor * Z)."""
    batch, _, *size = x.shape
    x = x.reshape(batch, -1, factor, factor, factor, *size)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(batch, -1, *(factor * length for length in size))


class FPNDecoder(nn.Module):
    """Fuse a pyramid of feature maps into one map of the input's size.

    Each level passes a 1x1x1 lateral conv to `width`; from coarse to fine the sum so far is upsampled trilinearly and
    added, then smoothed by 3x3x3 conv, GroupNorm and GELU. The head maps the finest level to `out_channels` and gets
    the input's resolution back by a voxel shuffle, so no layer works at full resolution (an eighth of the cost).

    Args:
        in_channels: channels of the maps, finest first.
        out_channels: channels of the output.
        width: channels inside the pyramid.
        stride: voxels per place of the finest map, an encoder's ``strides[0]``.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, *, width: int = 32, stride: int = 2):
        super().__init__()
        self.stride = stride
        self.laterals = nn.ModuleList(nn.Conv3d(channels, width, kernel_size=1, bias=False) for channels in in_channels)
        self.smooths = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(width, width, kernel_size=3, padding=1, bias=False),
                nn.GroupNorm(math.gcd(8, width), width),
                nn.GELU(),
            )
            for _ in in_channels[:-1]
        )
        self.head = nn.Conv3d(width, out_channels * stride**3, kernel_size=1)

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Decode `features`, finest first, into (B, out_channels, *size), `size` being the encoder's input size."""
        *finer, x = [lateral(level) for lateral, level in zip(self.laterals, features, strict=True)]
        for level, smooth in zip(reversed(finer), reversed(self.smooths), strict=True):
            x = smooth(level + F.interpolate(x, size=level.shape[2:], mode="trilinear"))
        x = shuffle_voxels(self.head(x), self.stride)
        return x[:, :, : size[0], : size[1], : size[2]]
