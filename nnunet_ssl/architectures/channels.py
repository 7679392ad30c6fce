"""Networks for cases that lack channels: which channels an image has, and four ways to go on without the others.

A channel that is absent is constant, zeros as a rule: nnU-Net reads it from a placeholder file. The network looks for
that itself, in every sample and every patch of a sliding window, so that it needs nothing beside the image.

Where an image is constant it shows nothing, so nothing tells a channel that was not scanned from one whose background
this is. What decides is the other channels. In a block of the patch a channel counts as absent if it is constant there
while another is not: it is missing, or the place is outside its field of view. A block in which all are constant is
background, and belongs to the channels that vary somewhere in the patch. So a patch of background alone in a channel
that was scanned makes it absent only where another channel shows tissue.
"""

from __future__ import annotations

import pydoc
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Way = Literal["zeros", "scaled", "pooled", "modulated"]
"""What becomes of the channels that there are, see :func:`any_channels`."""

WAYS: tuple[Way, ...] = get_args(Way)

NETWORK = "nnunet_ssl.architectures.channels.any_channels"
"""How plans name such a network."""

BLOCK = 8
"""Edge, in voxels, of the blocks in which a channel is looked for. Tissue varies within a block of any scan; a smaller
one would take voxels that happen to be equal for background."""

FLAT = 1e-3
"""Intensities that differ by less are equal. Images are z-scored, so it is a thousandth of a standard deviation: far
below any scanner's noise, and above what the resampling of a constant leaves."""


def channels_in_view(x: Tensor) -> Tensor:
    """Say where each channel shows anything, as the module's text defines it.

    Args:
        x: (B, C, X, Y, Z).

    Returns:
        (B, C, ceil(X / BLOCK), ceil(Y / BLOCK), ceil(Z / BLOCK)), boolean. All False for a sample that is constant in
        all channels. It commutes with flips, and with permutations of the channels.
    """
    grid = [-(-length // BLOCK) for length in x.shape[2:]]
    varies = F.adaptive_max_pool3d(x, grid) + F.adaptive_max_pool3d(-x, grid) > FLAT
    somewhere = varies.flatten(2).any(2)[:, :, None, None, None]
    return varies | (somewhere & ~varies.any(1, keepdim=True))


def on_grid(blocks: Tensor, size: Sequence[int]) -> Tensor:
    """Bring a boolean map of blocks onto a finer or coarser grid: a place is True if any block in it is."""
    return F.adaptive_max_pool3d(blocks.float(), tuple(size)) > 0


@torch.no_grad()
def without_absent(x: Tensor) -> tuple[Tensor, Tensor]:
    """Set channels to 0 where they are absent, so that no constant of a placeholder or of a normalisation is seen.

    Args:
        x: (B, C, X, Y, Z).

    Returns:
        `x` with the zeros, and the blocks of the channels that count (see :func:`channels_in_view`): at least one
        channel everywhere, all channels where a sample has none.
    """
    view = channels_in_view(x)
    return x * on_grid(view, x.shape[2:]), view | ~view.any(1, keepdim=True)


def scaled_by_presence(x: Tensor) -> Tensor:
    """Multiply what is there by the number of channels over the number that are there, and set the rest to 0.

    A first convolution that was repeated for C channels and divided by C then gives the mean of its responses to the
    channels that are there.
    """
    x, counted = without_absent(x)
    return x * (x.shape[1] / on_grid(counted, x.shape[2:]).sum(1, keepdim=True))


def with_zeros(x: Tensor) -> Tensor:
    """Set channels to 0 where they are absent; 0 is the mean of a z-scored image."""
    return without_absent(x)[0]


class Pooled(nn.Module):
    """A module for one channel, used on each channel in turn, with its maps pooled over the channels that are there.

    A map becomes ``mean + gate * (maximum - mean)`` with a gate for each of its features, which learns from 1/2. Any
    order of the channels gives the same, and so do copies of a channel: what the module makes of that one. That is how
    `modulated` begins, too.

    Args:
        module: maps (B, 1, X, Y, Z) to a map (B, F, ...), or to a list of maps.
        features: of each map, finest first.
        modulated: None, or the number of channels, whose maps are then scaled and shifted before they are pooled, by
            learned numbers of each channel for each feature, from 1 and 0 (FiLM, Perez 2018). The module sees any
            channel alike, and what follows it can tell them apart: that fluid is bright in one, and a lesion in
            another.
    """

    def __init__(self, module: nn.Module, features: Sequence[int], modulated: int | None = None) -> None:
        super().__init__()
        self.module = module
        self.gates = nn.ParameterList(torch.full((number,), 0.5) for number in features)
        self.scales, self.shifts = (
            nn.ParameterList(torch.full((modulated, number), start) for number in features if modulated)
            for start in (1.0, 0.0)
        )

    def parts(self) -> list[nn.Module]:
        """The parts of the module, for :func:`nnunet_ssl.architectures.compiling.compile_parts`."""
        parts: list[nn.Module] = self.module.parts()  # type: ignore[operator]  # of an encoder
        return parts

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Map (B, C, X, Y, Z) to what the module makes of one channel."""
        x, counted = without_absent(x)
        maps = self.module(x.flatten(0, 1)[:, None])
        single = isinstance(maps, Tensor)
        levels = [level.unflatten(0, x.shape[:2]) for level in ([maps] if single else maps)]
        if self.scales:
            levels = list(map(_modulated, levels, self.scales, self.shifts))
        pooled = [_pooled(level, counted, gate) for level, gate in zip(levels, self.gates, strict=True)]
        return pooled[0] if single else pooled


def _modulated(level: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift (B, C, F, X, Y, Z) by numbers (C, F), in the type that autocast chose for the maps."""
    scale, shift = (one.to(level.dtype)[:, :, None, None, None] for one in (scale, shift))
    return torch.addcmul(shift, level, scale)


def _pooled(level: Tensor, counted: Tensor, gate: Tensor) -> Tensor:
    """Pool (B, C, F, ...) over the channels that count, to (B, F, ...)."""
    absent = ~on_grid(counted, level.shape[3:])[:, :, None]
    mean = level.masked_fill(absent, 0).sum(1) / (~absent).sum(1)
    maximum = level.masked_fill(absent, -torch.inf).amax(1)
    return mean + gate.to(mean.dtype)[:, None, None, None] * (maximum - mean)


def any_channels(input_channels: int, num_classes: int, *, channels: Way, network: str, **settings: Any) -> nn.Module:
    """Build a segmentation network that takes any subset of its channels, as nnU-Net's plans name it.

    It is the network itself, changed where the channels enter:

    - ``zeros``: absent channels are 0 in its first convolution.
    - ``scaled``: the same, and what is there is multiplied by the number of channels over that of channels there.
    - ``pooled``: each channel goes alone through an encoder for one channel, and the maps are pooled, see
      :class:`Pooled`.
    - ``modulated``: the same, and the maps of each channel are scaled and shifted by learned numbers of its own.

    Args:
        input_channels: of the data set.
        num_classes: channels of the output.
        channels: the way.
        network: the dotted path of the network's class. What looks at the image is its ``encoder``, and in a decoder's
            ``full_resolution`` what makes a skip of it.
        settings: keywords of that class.
    """
    alone = channels in ("pooled", "modulated")
    number = 1 if alone else input_channels
    built: Any = pydoc.locate(network)(input_channels=number, num_classes=num_classes, **settings)  # type: ignore
    if alone:
        modulated = input_channels if channels == "modulated" else None
        encoder, skip = built.encoder, getattr(built.decoder, "full_resolution", None)
        built.encoder = Pooled(encoder, getattr(encoder, "channels", None) or encoder.output_channels, modulated)
        if skip is not None:
            built.decoder.full_resolution = Pooled(skip, [skip.output_channels], modulated)
    else:
        built.register_forward_pre_hook(_scaled if channels == "scaled" else _zeroed)
    return built


def _scaled(network: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (scaled_by_presence(*inputs),)


def _zeroed(network: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (with_zeros(*inputs),)


def with_any_channels(entry: Mapping[str, Any], way: Way | None) -> dict[str, Any]:
    """Return a network's entry in the plans, made for cases that lack channels."""
    if way is None:
        return dict(entry)
    added = {"channels": way, "network": entry["network_class_name"]}
    return dict(entry) | {"network_class_name": NETWORK, "arch_kwargs": dict(entry["arch_kwargs"]) | added}


def plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry that :func:`with_any_channels` began with; any other entry as it is."""
    if not takes_any_channels(entry):
        return dict(entry)
    kept = {key: value for key, value in entry["arch_kwargs"].items() if key not in ("channels", "network")}
    return dict(entry) | {"network_class_name": entry["arch_kwargs"]["network"], "arch_kwargs": kept}


def takes_any_channels(entry: Mapping[str, Any]) -> bool:
    """Tell whether the network of an entry can do without some of its channels."""
    return bool(entry["network_class_name"] == NETWORK)
