"""SwinEncoder: the hybrid Swin UNETR-V2 encoder, five feature maps from a volume.

Tang et al. 2022 (Swin UNETR, arXiv 2111.14791), He et al. 2023 (Swin UNETR-V2: a residual conv block before each Swin
stage) and the GroupNorm and mask token of arXiv 2511.11311. Given the same weights the maps equal those of MONAI's
``SwinTransformer(use_v2=True)(x, normalize=True)``; the tests hold it to 1e-10 in float64.

Tokens stay channels-last from the patch embedding to the outputs, so linear layers, LayerNorms and windows need no
copies. The conv blocks take them as they lie, which is PyTorch's ``channels_last_3d``. Whether everything in a block
keeps that layout is up to PyTorch's kernels: the group and instance norms of a GPU may return another one. That has not
been measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nnunet_ssl.architectures.masking import check_mask, expand_mask
from nnunet_ssl.architectures.window_attention import window_attention
from nnunet_ssl.architectures.windows import WindowPlan, plan_windows
from nnunet_ssl.errors import UserError

EMBED_DIM, DEPTHS, NUM_HEADS, WINDOW_SIZE = 48, (2, 2, 6, 2), (3, 6, 12, 24), 7
"""The encoder of arXiv 2511.11311."""

Merging = Literal["monai", "monai_1.4", "mergingv2"]
MERGINGS: dict[str, tuple[tuple[int, ...], ...]] = {
    "monai": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    "monai_1.4": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),
    "mergingv2": tuple(itertools.product((0, 1), repeat=3)),
}
"""The tokens of a 2x2x2 cell that a patch merging concatenates, in their order.

"monai" and "mergingv2" are MONAI's ``downsample="merging"``, its default, and ``"mergingv2"``. Up to version 1.4 its
default doubled two tokens and left two out, and weights trained so must be computed so: "monai_1.4".
"""


class PatchEmbedding(nn.Module):
    """A volume (B, C, X, Y, Z), zero-padded to whole patches, to tokens (B, x, y, z, width)."""

    def __init__(self, in_channels: int, width: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        missing = [-size % self.patch_size for size in x.shape[2:]]
        if any(missing):
            x = F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]))
        return self.proj(x).permute(0, 2, 3, 4, 1).contiguous()


class ResidualBlock(nn.Module):
    """The convolutions of "V2": two 3x3x3 convs with norm and LeakyReLU, on tokens (B, x, y, z, C)."""

    def __init__(self, channels: int, norm: str, groups: int):
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.conv2 = nn.Conv3d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm1 = conv_normalization(norm, channels, groups)
        self.norm2 = conv_normalization(norm, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 4, 1, 2, 3)  # a view in channels_last_3d
        y = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        y = F.leaky_relu(self.norm2(self.conv2(y)) + x, 0.01)
        return y.permute(0, 2, 3, 4, 1)


def conv_normalization(kind: str, channels: int, groups: int) -> nn.Module:
    """Return the norm of the conv blocks: "instance" (MONAI's, without parameters) or "group".

    "group" has `groups` groups, or the largest number below that divides both it and `channels` (4 for 8 and 12).
    """
    if kind == "instance":
        return nn.InstanceNorm3d(channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(groups, channels), channels)
    raise UserError(f"The norm of the conv blocks is '{kind}'; it can be 'group' or 'instance'.")


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learnt bias for each relative position."""

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int, window: int):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 3, heads))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.register_buffer("relative_position_index", relative_positions(window), persistent=False)

    def forward(self, tokens: Tensor, plan: WindowPlan) -> Tensor:
        """Attend within the windows of `plan`; tokens (batch * tokens, C) in and out."""
        # A padded token is a zero vector before the projection, so its projection is the projection's bias.
        attended = window_attention(self.qkv(tokens), self.qkv.bias, self.bias(plan.length), plan)
        return self.proj(attended)

    def bias(self, length: int) -> Tensor:
        """Return the bias (heads, length, length) of windows of `length` tokens.

        A window smaller than the table's takes the first rows and columns of the full index, as MONAI does. Geometry
        would ask for another choice, but this is how published weights were trained.
        """
        index = self.relative_position_index[:length, :length]
        bias = self.relative_position_bias_table.index_select(0, index.reshape(-1))
        return bias.reshape(length, length, self.heads).permute(2, 0, 1).contiguous()


def relative_positions(window: int) -> Tensor:
    """Return (window**3, window**3): the row of the bias table for each pair of places in a window."""
    place = torch.cartesian_prod(*[torch.arange(window)] * 3)
    offset = place[:, None] - place[None, :] + window - 1
    x, y, z = offset.unbind(-1)
    return (x * (2 * window - 1) + y) * (2 * window - 1) + z


class SwinBlock(nn.Module):
    """Window attention and an MLP, each after a LayerNorm and with a residual connection."""

    def __init__(self, channels: int, heads: int, window: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels)
        hidden = int(channels * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))

    def forward(self, tokens: Tensor, plan: WindowPlan) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens), plan)
        return tokens + self.mlp(self.norm2(tokens))


class PatchMerging(nn.Module):
    """Halve the grid: concatenate eight tokens of each 2x2x2 cell, normalise, reduce to twice the channels."""

    def __init__(self, channels: int, merging: str):
        super().__init__()
        self.octants = MERGINGS[merging]
        self.norm = nn.LayerNorm(8 * channels)
        self.reduction = nn.Linear(8 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        odd = [size % 2 for size in x.shape[1:4]]
        if any(odd):
            x = F.pad(x, (0, 0, 0, odd[2], 0, odd[1], 0, odd[0]))
        x = torch.cat([x[:, i::2, j::2, k::2] for i, j, k in self.octants], dim=-1)
        return self.reduction(self.norm(x))


def check_merging(merging: str | None) -> None:
    """Refuse a merging that is not known; None stands for weights whose file does not tell it.

    Raises:
        UserError: `merging` is no key of :data:`MERGINGS`.
    """
    if merging is None:
        raise UserError(
            "The file does not tell which tokens the patch mergings of its weights take, and MONAI 1.5 changed that. "
            "Say it, to nnssl_weights with --merging, to a fine-tuning with nnssl_settings=merging=...: monai_1.4 "
            "(trained with MONAI up to 1.4, as most published weights), monai (1.5 or later), or mergingv2."
        )
    if merging not in MERGINGS:
        raise UserError(f"The patch merging is '{merging}'; it can be one of: {', '.join(MERGINGS)}.")


class SwinStage(nn.Module):
    """A conv block, Swin blocks with plain and shifted windows in turn, and a patch merging."""

    def __init__(
        self, channels: int, depth: int, heads: int, window: int, mlp_ratio: float, *, conv: nn.Module, merging: str
    ):
        super().__init__()
        self.window = window
        self.conv = conv
        self.blocks = nn.ModuleList(SwinBlock(channels, heads, window, mlp_ratio) for _ in range(depth))
        self.merging = PatchMerging(channels, merging)

    def forward(self, x: Tensor, *, checkpointing: bool) -> Tensor:
        """Map tokens (B, x, y, z, C) to (B, ceil(x / 2), ceil(y / 2), ceil(z / 2), 2 C)."""
        x = self.conv(x)
        batch, *grid, channels = x.shape
        tokens = x.reshape(-1, channels)
        for number, block in enumerate(self.blocks):
            plan = plan_windows(tuple(grid), self.window, shifted=number % 2 == 1, batch=batch, device=x.device)
            if checkpointing and torch.is_grad_enabled():  # nothing in a block is random
                tokens = checkpoint(block, tokens, plan, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, plan)
        return self.merging(tokens.reshape(batch, *grid, channels))


class SwinEncoder(nn.Module):
    """Volumes of any size to a pyramid of feature maps, finest first, each normalised over its channels.

    Args:
        in_channels: channels of the input.
        embed_dim: channels of the finest map; each further stage doubles them.
        depths: Swin blocks per stage.
        num_heads: attention heads per stage; each must divide the stage's channels.
        window_size: edge of the attention windows, in tokens.
        patch_size: edge of the patches that become tokens, in voxels: the stride of the finest map.
        mlp_ratio: hidden width of the MLPs over their channels.
        conv_norm: norm of the conv blocks, "group" (the paper's) or "instance" (MONAI's); None: there are no conv
            blocks, as in the first Swin UNETR.
        conv_groups: groups of the norm "group".
        merging: which tokens a patch merging concatenates, a key of :data:`MERGINGS`.
        mask_token: own the learnt vector that stands for hidden tokens; needed to call with a mask.
        checkpointing: recompute the Swin blocks in the backward pass: less memory, about a third more time.

    Attributes:
        channels: channels of the maps, (48, 96, 192, 384, 768) by default.
        strides: voxels per place of the maps, (2, 4, 8, 16, 32) by default.

    Raises:
        UserError: the sizes do not fit each other.
    """

    def __init__(
        self,
        in_channels: int = 1,
        *,
        embed_dim: int = EMBED_DIM,
        depths: Sequence[int] = DEPTHS,
        num_heads: Sequence[int] = NUM_HEADS,
        window_size: int = WINDOW_SIZE,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        conv_norm: str | None = "group",
        conv_groups: int = 8,
        merging: str = "monai",
        mask_token: bool = True,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.channels = tuple(embed_dim * 2**level for level in range(len(depths) + 1))
        self.strides = tuple(patch_size * 2**level for level in range(len(depths) + 1))
        self.checkpointing = checkpointing
        if len(num_heads) != len(depths):
            raise UserError(f"The encoder has {len(depths)} depths {tuple(depths)} but {len(num_heads)} num_heads.")
        for heads, channels in zip(num_heads, self.channels, strict=False):
            if channels % heads:
                raise UserError(f"A stage of {channels} channels cannot have {heads} heads: they must divide it.")
        check_merging(merging)
        self.patch_embed = PatchEmbedding(in_channels, embed_dim, patch_size)
        self.mask_token = nn.Parameter(torch.zeros(embed_dim)) if mask_token else None
        self.stages = nn.ModuleList(
            SwinStage(
                channels,
                depth,
                heads,
                window_size,
                mlp_ratio,
                conv=nn.Identity() if conv_norm is None else ResidualBlock(channels, conv_norm, conv_groups),
                merging=merging,
            )
            for channels, depth, heads in zip(self.channels, depths, num_heads, strict=False)
        )
        self._initialise()

    def _initialise(self) -> None:
        """Draw linear layers, bias tables and the mask token as Swin does; convolutions keep PyTorch's default."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def parts(self) -> list[nn.Module]:
        """The modules that repeat, for :func:`nnunet_ssl.architectures.compiling.compile_parts`."""
        return [module for module in self.modules() if isinstance(module, (ResidualBlock, SwinBlock, PatchMerging))]

    def by_depth(self) -> dict[str, list[str]]:
        """Modules and parameters by depth, for
        :func:`nnunet_ssl.architectures.backbones.base.parameters_by_depth`."""
        stages = {f"stage{number + 1}": [f"stages.{number}"] for number in range(len(self.stages))}
        return {"embedding": ["patch_embed", "mask_token"], **stages}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Encode volumes.

        Args:
            x: (B, C, X, Y, Z).
            mask: (B, ceil(X / s), ceil(Y / s), ceil(Z / s)) with s the last of `strides`; boolean, True hides a cell:
                all its tokens become the mask token before the first stage.

        Returns:
            The maps, level i of shape (B, channels[i], ceil(X / strides[i]), ...).

        Raises:
            ValueError: `mask` has another shape, or the encoder has no mask token.
        """
        tokens = self.patch_embed(x)
        if mask is not None:
            check_mask(mask, x, self.strides[-1])
            tokens = self._hide(tokens, mask)
        maps = [tokens]
        for stage in self.stages:
            maps.append(stage(maps[-1], checkpointing=self.checkpointing))
        return [F.layer_norm(level, level.shape[-1:]).permute(0, 4, 1, 2, 3) for level in maps]

    def _hide(self, tokens: Tensor, mask: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError("This encoder was built with mask_token=False, so it cannot hide what a mask covers.")
        hidden = expand_mask(mask, tokens.shape[1:4], self.strides[-1] // self.strides[0])
        return torch.where(hidden[..., None], self.mask_token.to(tokens.dtype), tokens)
