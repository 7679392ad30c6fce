"""The key network, a moving average of the query network, and the queue of the keys it made."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nnunet_ssl.pretraining.objectives.contrastive import EMPTY


class Queue(nn.Module):
    """A ring of keys, each with its subject and session; buffers, so that a checkpoint holds them.

    Args:
        size: slots.
        dim: of a key.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("subjects", torch.full((size,), EMPTY))
        self.register_buffer("sessions", torch.full((size,), EMPTY))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def filled(self) -> Tensor:
        """The keys that the queue holds, (n, D)."""
        return self.keys[self.subjects != EMPTY]

    @torch.no_grad()
    def enqueue(self, keys: Tensor, subjects: Tensor, sessions: Tensor) -> None:
        """Overwrite the oldest slots; of more keys than slots the last ones stay. Nothing leaves the device.

        Args:
            keys: (n, D).
            subjects: (n,).
            sessions: (n,).
        """
        size = len(self.keys)
        keys, subjects, sessions = keys[-size:], subjects[-size:], sessions[-size:]
        slots = (self.position + torch.arange(len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, slots, keys.to(self.keys.dtype))
        self.subjects.index_copy_(0, slots, subjects)
        self.sessions.index_copy_(0, slots, sessions)
        self.position.copy_((self.position + len(keys)) % size)


@torch.no_grad()
def move_towards(average: nn.Module, network: nn.Module, momentum: float) -> None:
    """average = momentum * average + (1 - momentum) * network, for every parameter and buffer that `average` has.

    Buffers that are not floating-point numbers are copied. `network` may have modules that `average` lacks.
    """
    theirs = state_of(network)
    pairs = [(mine, theirs[name]) for name, mine in state_of(average).items()]
    moving = [(mine, their) for mine, their in pairs if mine.is_floating_point()]
    torch._foreach_lerp_([mine for mine, _ in moving], [their for _, their in moving], 1 - momentum)
    for mine, their in pairs:
        if not mine.is_floating_point():
            mine.copy_(their)


def state_of(network: nn.Module) -> Mapping[str, Tensor]:
    """Parameters and buffers by name, without copies."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}
