"""Networks by name and numbers: what a checkpoint's architecture or nnU-Net's plans describe, built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nnunet_ssl.architectures.backbones import backbone_of
from nnunet_ssl.architectures.backbones.swin import SwinConfig
from nnunet_ssl.architectures.fpn import FPNDecoder
from nnunet_ssl.architectures.resenc import ResEncEncoder
from nnunet_ssl.architectures.swin import SwinEncoder
from nnunet_ssl.architectures.unet import PyramidDecoder
from nnunet_ssl.errors import UserError

PAPER_ENCODER = {"backbone": "swin", "in_channels": 1, **SwinConfig().architecture(masked=False)}
"""The architecture of arXiv 2511.11311, for a network that takes no checkpoint's."""


def build_encoder(architecture: Mapping[str, Any]) -> nn.Module:
    """Build an encoder from an architecture as checkpoints carry it.

    Args:
        architecture: ``{"backbone": the name of one, "in_channels": 1, ...}``; every other key is a keyword of the
            backbone's class. JSON-serialisable.

    Returns:
        A module that is an :class:`nnunet_ssl.architectures.backbones.base.Encoder`.

    Raises:
        UserError: an unknown backbone or keyword, or sizes that do not fit each other.
    """
    settings = dict(architecture)
    backbone = backbone_of(settings.pop("backbone", None))
    try:
        return backbone.encoder(**settings)
    except TypeError as error:
        raise UserError(f"The architecture of the '{backbone.name}' encoder does not fit: {error}.") from error


def pooled(bottleneck: Tensor) -> Tensor:
    """The embedding of a view: the average over space, (B, C, x, y, z) to (B, C)."""
    return bottleneck.mean(dim=(2, 3, 4))


class EncoderFPN(nn.Module):
    """An encoder and FPNDecoder, which has one output, at full resolution.

    Args:
        encoder: of a backbone.
        num_classes: channels of the output.
        width: channels inside the decoder.
    """

    def __init__(self, encoder: SwinEncoder | ResEncEncoder, num_classes: int, width: int):
        super().__init__()
        self.encoder: SwinEncoder | ResEncEncoder = encoder
        self.decoder = FPNDecoder(encoder.channels, num_classes, width=width, stride=encoder.strides[0])

    def parts(self) -> list[nn.Module]:
        """The modules that repeat, for :func:`nnunet_ssl.architectures.compiling.compile_parts`, and the decoder."""
        return [*self.encoder.parts(), self.decoder]

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, input_channels, X, Y, Z) to logits (B, num_classes, X, Y, Z)."""
        return self.decoder(self.encoder(x), x.shape[2:])


class SwinFPN(EncoderFPN):
    """SwinEncoder and FPNDecoder as the segmentation network that nnU-Net builds from its plans.

    The encoder has no mask token here: a parameter that no loss reaches would stop distributed training.

    Args:
        input_channels: channels of the input.
        num_classes: channels of the output.
        deep_supervision: accepted because nnU-Net passes it; the network has one output at full resolution either way.
        width: channels inside the decoder.
        encoder_kwargs: keywords of :class:`SwinEncoder`, JSON-serialisable, as a checkpoint's architecture has them.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        width: int = 32,
        **encoder_kwargs: Any,
    ):
        encoder = SwinEncoder(input_channels, **{**encoder_kwargs, "mask_token": False})
        super().__init__(encoder, num_classes, width)


class ResEncFPN(EncoderFPN):
    """ResEncEncoder and FPNDecoder: the network of a masked modelling on a residual encoder, with another head.

    Args:
        input_channels: channels of the input.
        num_classes: channels of the output.
        deep_supervision: accepted because nnU-Net passes it; the network has one output at full resolution either way.
        width: channels inside the decoder.
        encoder_kwargs: keywords of :class:`ResEncEncoder`.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        width: int = 32,
        **encoder_kwargs: Any,
    ):
        super().__init__(ResEncEncoder(input_channels, **encoder_kwargs), num_classes, width)


class SwinUNet(nn.Module):
    """SwinEncoder and a U-Net decoder of nnU-Net's blocks, with a skip and outputs at full resolution.

    Args:
        input_channels: channels of the input.
        num_classes: channels of the outputs.
        deep_supervision: whether there are outputs at all scales but the coarsest, or the full resolution's alone.
        encoder_kwargs: keywords of :class:`SwinEncoder`, JSON-serialisable, as a checkpoint's architecture has them.
    """

    def __init__(self, input_channels: int, num_classes: int, deep_supervision: bool = False, **encoder_kwargs: Any):
        super().__init__()
        self.encoder = SwinEncoder(input_channels, **{**encoder_kwargs, "mask_token": False})
        self.decoder = PyramidDecoder(
            input_channels,
            self.encoder.channels,
            self.encoder.strides,
            num_classes=num_classes,
            deep_supervision=deep_supervision,
        )

    def parts(self) -> list[nn.Module]:
        """The modules that repeat, for :func:`nnunet_ssl.architectures.compiling.compile_parts`, and the decoder."""
        return [*self.encoder.parts(), self.decoder]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Map (B, input_channels, X, Y, Z) to logits (B, num_classes, X, Y, Z), with deep supervision to a list of
        them, finest first, on the grids of ``decoder.output_strides``."""
        return self.decoder(x, self.encoder(x))
