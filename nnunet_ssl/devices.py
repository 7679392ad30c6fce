"""Where PyTorch computes: what -device may name, and what is taken where nobody names anything."""

from __future__ import annotations

import torch

from nnunet_ssl.errors import UserError


def find_device(name: str) -> torch.device:
    """Return the torch device that ``-device`` names: cuda, cuda:1, cpu or mps.

    Raises:
        UserError: it is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu", "mps"):
        raise UserError(f"-device {name} is no device: use cuda, cuda:1, cpu or mps.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"-device {name}: PyTorch sees no CUDA device here. Use -device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"-device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices, the first is cuda:0.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("-device mps: PyTorch sees no Apple GPU here. Use -device cpu.")
    return device


def default_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
