"""PyramidDecoder: nnU-Net's U-Net decoder on the maps of an encoder that has none at full resolution."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor

from nnunet_ssl.architectures.resenc import LAYERS

WIDTH = 32
"""Channels at full resolution: those of nnU-Net's first stage."""


class PyramidDecoder(UNetDecoder):
    """Transposed convolutions from map to map, each joined by a skip and followed by a convolution, up to the image.

    The blocks, and one convolution a stage, are those of nnU-Net's ResEnc U-Nets. The skip at full resolution is the
    image after two convolutions, which are the decoder's: no encoder has seen them in pre-training.

    Args:
        input_channels: of the image.
        channels: of the maps, finest first.
        strides: voxels per place of the maps, finest first.
        num_classes: channels of the outputs.
        deep_supervision: whether there are outputs at all scales but the coarsest map's; may be set later.

    Attributes:
        output_strides: voxels per place of the outputs under deep supervision, finest first.
    """

    def __init__(
        self,
        input_channels: int,
        channels: Sequence[int],
        strides: Sequence[int],
        *,
        num_classes: int,
        deep_supervision: bool,
    ):
        steps = [fine // coarse for fine, coarse in zip(strides, (1, *strides))]
        encoder = SimpleNamespace(
            output_channels=[WIDTH, *channels], strides=[1, *steps], kernel_sizes=[3] * (len(channels) + 1), **LAYERS
        )
        super().__init__(encoder, num_classes, n_conv_per_stage=1, deep_supervision=deep_supervision)
        self.full_resolution = StackedConvBlocks(
            2, initial_stride=1, kernel_size=3, input_channels=input_channels, output_channels=WIDTH, **LAYERS
        )
        self.output_strides = (1, *strides[:-1])
        self.apply(InitWeights_He(1e-2))

    def forward(self, image: Tensor, maps: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Decode.

        Args:
            image: (B, input_channels, X, Y, Z).
            maps: level i of shape (B, channels[i], ceil(X / strides[i]), ...). What a transposed convolution adds
                beyond the next finer map is cut off.

        Returns:
            Logits (B, num_classes, X, Y, Z); with deep supervision a list, place i of shape
            (B, num_classes, ceil(X / output_strides[i]), ...).
        """
        *finer, x = self.full_resolution(image), *maps
        outputs: list[Tensor] = []
        for level in reversed(range(len(finer))):
            place, skip = len(finer) - 1 - level, finer[level]
            width, height, depth = skip.shape[2:]
            x = self.transpconvs[place](x)[:, :, :width, :height, :depth]
            x = self.stages[place](torch.cat((x, skip), dim=1))
            if self.deep_supervision or level == 0:
                outputs.append(self.seg_layers[place](x))
        return outputs[::-1] if self.deep_supervision else outputs[0]
