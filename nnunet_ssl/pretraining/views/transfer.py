"""The way of small tensors to the training device, which nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor of the CPU to `device`.

    A copy from ordinary memory would make the CPU wait for all that a GPU has been told to do before; a copy from
    page-locked memory takes its turn.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
