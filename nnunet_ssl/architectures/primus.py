"""PrimusEncoder: the vision transformer of MIC-DKFZ's Primus, one feature map at an eighth of the resolution.

Wald et al. 2025 (Primus, arXiv 2503.01835). The layers are those of dynamic-network-architectures' own class, so a
state dict fits it name by name.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.building_blocks.patch_encode_decode import LayerNormNd, PatchDecode
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nnunet_ssl.architectures.compiling import real_tensors
from nnunet_ssl.architectures.masking import check_mask
from nnunet_ssl.errors import UserError

STRIDE = 8
"""Voxels per token along each axis, in every published Primus."""

SIZES = {
    "S": {"embed_dim": 396, "depth": 12, "heads": 6},
    "B": {"embed_dim": 792, "depth": 12, "heads": 12},
    "M": {"embed_dim": 864, "depth": 16, "heads": 12},
    "L": {"embed_dim": 1056, "depth": 24, "heads": 16},
}
"""Of dynamic-network-architectures; the published ViT of nnFoundation is L with 40 blocks."""


class PrimusEncoder(nn.Module):
    """Volumes of any size to a feature map of tokens.

    The learned position embedding belongs to the grid of the pre-training's patches. For another grid it is resized
    trilinearly in every forward pass, and the rotary embedding is that of the grid at hand, as nnU-Net has them when it
    builds a Primus for another patch.

    Args:
        in_channels: channels of the input.
        embed_dim: channels of a token.
        depth: transformer blocks.
        heads: of the attention.
        grid: tokens along each axis for which the position embedding is learned.
        init_values: the layer scale's first value; None: no layer scale.
        scale_attn_inner: normalise inside the attention.
        mask_token: have a learned token in the place of hidden ones.
        checkpointing: recompute the blocks in the backward pass: less memory, about a third more time.

    Attributes:
        channels: of the only map, (embed_dim,).
        strides: voxels per token, (8,).

    Raises:
        UserError: the sizes do not fit each other.
    """

    def __init__(
        self,
        in_channels: int = 1,
        *,
        embed_dim: int = SIZES["M"]["embed_dim"],
        depth: int = SIZES["M"]["depth"],
        heads: int | None = SIZES["M"]["heads"],
        grid: Sequence[int] = (20, 20, 20),
        init_values: float | None = 0.1,
        scale_attn_inner: bool = True,
        mask_token: bool = True,
        checkpointing: bool = False,
    ):
        if heads is None or embed_dim % (6 * heads):
            raise UserError(
                f"A Primus of {embed_dim} channels cannot have {heads} heads: the rotary embedding of three axes needs "
                "channels that are a multiple of six for each head. Where a file does not tell its heads, they are "
                f"known of {', '.join(str(size['embed_dim']) for size in SIZES.values())} channels."
            )
        from dynamic_network_architectures.architectures.primus import Primus  # and timm, which takes seconds

        super().__init__()
        primus = Primus(
            input_channels=in_channels,
            embed_dim=embed_dim,
            patch_embed_size=(STRIDE,) * 3,
            num_classes=1,
            eva_depth=depth,
            eva_numheads=heads,
            input_shape=tuple(STRIDE * length for length in grid),
            init_values=init_values,
            scale_attn_inner=scale_attn_inner,
        )
        self.down_projection, self.eva = primus.down_projection, primus.eva
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            nn.init.normal_(self.mask_token, std=0.02)
        self.channels = (embed_dim,)
        self.strides = (STRIDE,)
        self.grid = tuple(grid)
        self.rotary_dim = round(embed_dim / heads / 1.5)
        self.checkpointing = checkpointing

    def parts(self) -> list[nn.Module]:
        """The modules that repeat, for :func:`nnunet_ssl.architectures.compiling.compile_parts`."""
        return list(self.eva.blocks)

    def by_depth(self) -> dict[str, list[str]]:
        """Modules and parameters by depth, for :func:`nnunet_ssl.architectures.backbones.base.parameters_by_depth`.

        The blocks, which are all of one width, go together by quarters: a Swin encoder has four stages, too.
        """
        depths = {"embedding": ["down_projection", "eva.pos_embed", "mask_token"]}
        for blocks in np.array_split(range(len(self.eva.blocks)), min(4, len(self.eva.blocks))):
            name = f"blocks{blocks[0] + 1}to{blocks[-1] + 1}" if len(blocks) > 1 else f"block{blocks[0] + 1}"
            depths[name] = [f"eva.blocks.{block}" for block in blocks]
        return depths | {"norm": ["eva.norm"]}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Encode volumes.

        A size that is no multiple of 8 is padded with zeros at its far end.

        Args:
            x: (B, C, X, Y, Z).
            mask: (B, ceil(X / 8), ceil(Y / 8), ceil(Z / 8)), boolean, True hides a token.

        Returns:
            The only map, (B, embed_dim, ceil(X / 8), ...), in a list.

        Raises:
            ValueError: `mask` has another shape.
        """
        if mask is not None:
            check_mask(mask, x, STRIDE)
        missing = [-length % STRIDE for length in x.shape[2:]]
        if any(missing):
            x = F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]))
        x = self.down_projection(x)
        grid = tuple(x.shape[2:])
        x = x.flatten(2).transpose(1, 2)
        if mask is not None:
            x = torch.where(mask.flatten(1)[..., None], self.mask_token.to(x.dtype), x)
        x = x + self._positions(grid)
        rotation = _rotation(self.rotary_dim, grid, x.device)
        for block in self.eva.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope=rotation, use_reentrant=False)
            else:
                x = block(x, rope=rotation)
        return [self.eva.norm(x).transpose(1, 2).unflatten(2, grid)]

    def _positions(self, grid: tuple[int, ...]) -> Tensor:
        """The learned position embedding (1, tokens, C) of a grid."""
        positions = self.eva.pos_embed
        if grid == self.grid:
            return positions
        return resized_positions(positions, self.grid, grid)


def resized_positions(positions: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Resize a position embedding (1, tokens, C) from one grid to another, trilinearly as nnU-Net does."""
    volume = positions.transpose(1, 2).unflatten(2, tuple(old))
    return F.interpolate(volume, size=tuple(new), mode="trilinear", align_corners=False).flatten(2).transpose(1, 2)


@torch.compiler.disable  # a constant of the graph's caller, as the plans of windows are
@functools.lru_cache(maxsize=8)
@real_tensors()
def _rotation(dim: int, grid: tuple[int, ...], device: torch.device) -> Tensor:
    """The rotary embedding of a grid, (tokens, 2 * channels that rotate), of Primus' own kind."""
    from dynamic_network_architectures.architectures.primus import RotaryEmbeddingCat

    shape = list(grid)
    embedding: Tensor = RotaryEmbeddingCat(dim, in_pixels=False, feat_shape=shape, ref_feat_shape=shape).get_embed()
    return embedding.to(device)


class PrimusNetwork(nn.Module):
    """PrimusEncoder and Primus' own decoder, transposed convolutions without skips, as the network of nnU-Net's plans.

    Args:
        input_channels: channels of the input.
        num_classes: channels of the output.
        deep_supervision: accepted because nnU-Net passes it; the network has one output at full resolution either way.
        encoder_kwargs: keywords of :class:`PrimusEncoder`, JSON-serialisable, as a checkpoint's architecture has them.
    """

    def __init__(self, input_channels: int, num_classes: int, deep_supervision: bool = False, **encoder_kwargs: Any):
        super().__init__()
        self.encoder = PrimusEncoder(input_channels, **{**encoder_kwargs, "mask_token": False})
        width = self.encoder.channels[0]
        self.decoder = PatchDecode((STRIDE,) * 3, width, num_classes, norm=LayerNormNd, activation=nn.GELU)
        self.decoder.apply(InitWeights_He(1e-2))

    def parts(self) -> list[nn.Module]:
        """The modules that repeat, for :func:`nnunet_ssl.architectures.compiling.compile_parts`, and the decoder."""
        return [*self.encoder.parts(), self.decoder]

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, input_channels, X, Y, Z) to logits (B, num_classes, X, Y, Z)."""
        size = x.shape[2:]
        return self.decoder(self.encoder(x)[0])[:, :, : size[0], : size[1], : size[2]]
