"""The key network: a moving average of the query network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def move_towards(average: nn.Module, network: nn.Module, momentum: float) -> None:
    """average = momentum * average + (1 - momentum) * network, for every parameter and buffer that `average` has.

    Buffers that are not floating-point numbers are copied. `network` may have modules that `average` lacks.
    """
    theirs = tensors_of(network)
    pairs = [(mine, theirs[name]) for name, mine in tensors_of(average).items()]
    moving = [(mine, their) for mine, their in pairs if mine.is_floating_point()]
    torch._foreach_lerp_([mine for mine, _ in moving], [their for _, their in moving], 1 - momentum)
    for mine, their in pairs:
        if not mine.is_floating_point():
            mine.copy_(their)


def tensors_of(network: nn.Module) -> Mapping[str, Tensor]:
    """Parameters and buffers by name, without copies."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}
