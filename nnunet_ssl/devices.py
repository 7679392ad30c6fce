"""Where PyTorch computes: what -device may name, and what is taken where nobody names anything."""

from __future__ import annotations

import functools

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


def computes_in_bf16(device: torch.device) -> bool:
    """Whether an autocast to bfloat16 is of use: on a GPU that has it. On a CPU it would only lose precision."""
    return device.type == "cuda" and gpu_has_bf16()


@functools.cache
def gpu_has_bf16() -> bool:
    """Whether the GPU computes in bfloat16. V100 and T4 only emulate it, which takes longer than float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)
