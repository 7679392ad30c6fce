"""ResEncEncoder: nnU-Net's residual encoder, five feature maps from a volume.

Isensee et al. 2024 (nnU-Net Revisited, arXiv 2404.09556). The layers are those of dynamic-network-architectures, with
the settings of nnU-Net's ResEnc planners for 3-D, so a state dict fits nnU-Net's ``ResidualEncoderUNet.encoder`` name
by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nnunet_ssl.architectures.masking import check_mask, expand_mask
from nnunet_ssl.errors import UserError

LAYERS = {
    "conv_op": nn.Conv3d,
    "conv_bias": True,
    "norm_op": nn.InstanceNorm3d,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"inplace": True},
}
"""nnU-Net's, as its planners have them for 3-D."""

PRESETS = {
    "resenc_m": {"features": (32, 64, 128, 256, 320, 320), "blocks": (1, 3, 4, 6, 6, 6)},
    "resenc_l": {"features": (32, 64, 128, 256, 320, 320), "blocks": (1, 3, 4, 6, 6, 6)},
}
"""The encoders that nnU-Net's planners ResEncM and ResEncL give to patches of 128^3 and more.

They are equal: M and L are targets of GPU memory (8 and 24 GB) and differ in the patch and batch that fit. OpenMind's
published ResEnc-L has these numbers, too.
"""


class ResEncEncoder(ResidualEncoder):
    """Volumes of any size to a pyramid of feature maps, finest first, each normalised over its channels.

    The first stage works at full resolution and its map is left out of the pyramid, which begins at stride 2 as
    SwinEncoder's does: an FPN that smoothed it would cost about eight times what it costs now, and the stage learns
    through every map that follows. Maps are normalised on their way out, not between stages, as SwinEncoder's are:
    instance norms give a channel much the same average in every volume, so that averages over space, which the
    contrastive branch compares, would all but point the same way.

    Args:
        in_channels: channels of the input.
        features: channels per stage; the first stage has stride 1, each further one halves the grid.
        blocks: residual blocks per stage.
        checkpointing: recompute the stem and the blocks in the backward pass: less memory, about a third more time.

    Attributes:
        channels: channels of the maps, (64, 128, 256, 320, 320) by default.
        strides: voxels per place of the maps, (2, 4, 8, 16, 32) by default. (The base class keeps its stages' strides
            under this name; its ``compute_conv_feature_map_size`` is of no use here.)

    Raises:
        UserError: the sizes do not fit each other.
    """

    def __init__(
        self,
        in_channels: int = 1,
        *,
        features: Sequence[int] = PRESETS["resenc_l"]["features"],
        blocks: Sequence[int] = PRESETS["resenc_l"]["blocks"],
        checkpointing: bool = False,
    ):
        if len(features) != len(blocks) or len(features) < 2 or min(*features, *blocks) < 1:
            raise UserError(
                f"The encoder has features {tuple(features)} and blocks {tuple(blocks)}; it takes one number of each "
                "for every stage, and at least two stages."
            )
        super().__init__(
            input_channels=in_channels,
            n_stages=len(features),
            features_per_stage=list(features),
            kernel_sizes=3,
            strides=[1] + [2] * (len(features) - 1),
            n_blocks_per_stage=list(blocks),
            **LAYERS,
        )
        self.channels = tuple(features[1:])
        self.strides = tuple(2**level for level in range(1, len(features)))
        self.checkpointing = checkpointing
        self.apply(ResidualEncoderUNet.initialize)

    def parts(self) -> list[nn.Module]:
        """The modules that repeat, for :func:`nnunet_ssl.architectures.compiling.compile_parts`."""
        return [self.stem, *(block for stage in self.stages for block in stage.blocks)]

    def by_depth(self) -> dict[str, list[str]]:
        """Modules by depth, for :func:`nnunet_ssl.architectures.backbones.base.parameters_by_depth`."""
        return {"stem": ["stem"]} | {f"stage{number + 1}": [f"stages.{number}"] for number in range(len(self.stages))}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Encode volumes.

        A size that is no multiple of the coarsest stride is padded with zeros at its far end, which the stages' pooling
        needs; what lies wholly in the padding is cut off the maps. The padding takes part in the instance norms.

        Args:
            x: (B, C, X, Y, Z), more than a single place of the coarsest map, which no instance norm can treat.
            mask: (B, ceil(X / s), ceil(Y / s), ceil(Z / s)) with s the last of `strides`; boolean, True hides a cell:
                its voxels become 0, the mean of a z-scored brain.

        Returns:
            The maps, level i of shape (B, channels[i], ceil(X / strides[i]), ...).

        Raises:
            UserError: `x` is a single place of the coarsest map.
            ValueError: `mask` has another shape.
        """
        size = x.shape[2:]
        if max(size) <= self.strides[-1]:
            raise UserError(
                f"A volume of {tuple(size)} voxels is too small for the residual encoder: one side at least must be "
                f"longer than {self.strides[-1]} voxels."
            )
        if mask is not None:
            check_mask(mask, x, self.strides[-1])
            x = x.masked_fill(expand_mask(mask, size, self.strides[-1])[:, None], 0)
        missing = [-length % self.strides[-1] for length in size]
        if any(missing):
            x = F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]))
        x = self._run(self.stem, x)
        maps = []
        for stage in self.stages:
            for block in stage.blocks:
                x = self._run(block, x)
            maps.append(x)
        return [_finished(level, size, stride) for level, stride in zip(maps[1:], self.strides, strict=True)]

    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():  # nothing in a module is random
            return checkpoint(module, x, use_reentrant=False, preserve_rng_state=False)
        return module(x)


def _finished(level: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """Cut the map of a padded volume to the places that hold some of its `size` voxels, and normalise each place."""
    x, y, z = (-(-length // stride) for length in size)
    level = level[:, :, :x, :y, :z].movedim(1, -1)
    return F.layer_norm(level, level.shape[-1:]).movedim(-1, 1)
