"""Attention within the windows of a table of tokens: the operator where its kernels serve, PyTorch's own elsewhere.

Which of the two is decided in one place, :func:`kernels_serve`, once for each device, type and head size, after the
kernels have shown on a few windows that they compute there what PyTorch computes.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

from nnunet_ssl.architectures.attention import attention
from nnunet_ssl.architectures.compiling import real_tensors
from nnunet_ssl.architectures.window_operator import HEAD_SIZES, TYPES
from nnunet_ssl.architectures.window_operator import window_attention as operator
from nnunet_ssl.architectures.windows import WindowPlan, from_windows, plan_windows, to_windows

logger = logging.getLogger(__name__)

SWITCH = "nnssl_kernels"
"""An environment variable: "false" leaves window attention to PyTorch."""

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far from float64 (by norm, relatively) kernels may be in the self-check: a few units in the type's last place."""

CHECKED = (((8, 5, 3), 5, 1), ((5, 2, 1), 3, 9))
"""Grids, windows and batches of the self-check, in which every loop of the kernels is run through more than once:
windows of several tiles; and so many that the gradient of the bias is summed over those of a group, and over groups."""


def window_attention(qkv: Tensor, padding: Tensor, bias: Tensor, plan: WindowPlan) -> Tensor:
    """Attend within windows.

    Args:
        qkv: queries, keys and values (tokens, 3 C).
        padding: what padding places of windows hold in their stead (3 C,).
        bias: added to the scores (heads, length, length).
        plan: the windows of the tokens.

    Returns:
        Attended values (tokens, C).

    Raises:
        ValueError: the plan is of another number of tokens.
    """
    if len(qkv) != len(plan.row_of_token):
        raise ValueError(f"The plan is of {len(plan.row_of_token)} tokens, and there are {len(qkv)}.")
    padding = padding.to(qkv.dtype)
    if kernels_serve(qkv.device, qkv.dtype, qkv.shape[1] // (3 * len(bias))):
        return operator(qkv, padding, bias.float(), *plan.compact)[0]
    return attend_by_pytorch(qkv, padding, bias, plan)


@torch.compiler.disable  # its kernels are fused already, and with eight kinds of windows it is most of the graph
def attend_by_pytorch(qkv: Tensor, padding: Tensor, bias: Tensor, plan: WindowPlan) -> Tensor:
    """The same by gathers into and out of windows, with PyTorch's attention between them."""
    windows = to_windows(qkv, padding, plan)
    parts = windows.unflatten(2, (3, len(bias), -1)).permute(2, 0, 3, 1, 4)
    kinds = parts.split(plan.windows_of_kind, dim=1)
    attended = [
        attention(query, key, value, bias if penalty is None else bias + penalty.to(bias.dtype))
        for (query, key, value), penalty in zip(kinds, plan.penalties, strict=True)
    ]
    return from_windows(torch.cat([part.transpose(1, 2) for part in attended]).flatten(2), plan)


@torch.compiler.assume_constant_result
def kernels_serve(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether the operator's kernels compute the attention of such queries."""
    return _decide(device, dtype, head_size)


@functools.cache
def _decide(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    subject = f"Window attention of {str(dtype).removeprefix('torch.')} heads of {head_size} on {device}"
    try:
        if reason := unsuitable(device, dtype, head_size):
            logger.info("%s: PyTorch's, for %s.", subject, reason)
            return False
        deviation = self_check(device, dtype, head_size)
    except Exception as error:  # of a compiler or a driver: the training can do without
        first = str(error).strip().partition("\n")[0]
        logger.warning("%s: PyTorch's, for the kernels fail here (%s: %s).", subject, type(error).__name__, first)
        return False
    if not deviation <= TOLERANCES[dtype]:
        logger.warning("%s: PyTorch's, for the kernels are %.0e away from float64.", subject, deviation)
        return False
    logger.info("%s: Triton kernels, %.0e away from float64 in their self-check.", subject, deviation)
    return True


def unsuitable(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why the kernels cannot serve; None where they can be tried."""
    if os.environ.get(SWITCH, "").lower() in ("false", "f", "0"):
        return f"the environment says {SWITCH}={os.environ[SWITCH]}"
    if dtype not in TYPES:
        return "there are no kernels of this type"
    if head_size not in HEAD_SIZES:
        return f"the kernels are for heads of {', '.join(map(str, HEAD_SIZES))}"
    try:
        from nnunet_ssl.architectures.window_kernels import INTERPRETED
    except ImportError:
        return "Triton is not installed"
    if INTERPRETED:
        return None
    if device.type != "cuda" or torch.version.hip:
        return "the kernels are for NVIDIA's GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels are for GPUs since Ampere"
    return None


def self_check(device: torch.device, dtype: torch.dtype, head_size: int) -> float:
    """Compute some windows of every sort by the kernels, and in float64 by PyTorch.

    Nothing is drawn at random, so that nobody's random numbers change.

    Returns:
        The largest relative difference, by norm, of the attended values and of each gradient.
    """
    with real_tensors(), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        plans = [plan_windows(grid, size, shifted=True, batch=batch, device=device) for grid, size, batch in CHECKED]
        return float(torch.cat([_deviations(plan, device, dtype, head_size) for plan in plans]).max())  # NaN if one is


def _deviations(plan: WindowPlan, device: torch.device, dtype: torch.dtype, head_size: int) -> Tensor:
    heads, tokens = 2, len(plan.row_of_token)
    width = heads * head_size
    shapes = [(tokens, 3 * width), (3 * width,), (heads, *[plan.length] * 2)]
    qkv, padding = (_waves(shape, device).to(dtype) for shape in shapes[:2])
    bias, weight = _waves(shapes[2], device).float(), _waves((tokens, width), device).to(dtype)

    def results(attend: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        trained = [one.detach().requires_grad_() for one in inputs]
        out = attend(*trained)
        return [out, *torch.autograd.grad(out, trained, weight.to(out.dtype))]

    own = results(lambda *inputs: operator(*inputs, *plan.compact)[0], qkv, padding, bias)
    exact = results(lambda *inputs: attend_by_pytorch(*inputs, plan), *(one.double() for one in (qkv, padding, bias)))
    pairs = zip(own, exact, strict=True)
    return torch.stack([(one.double() - other).norm() / other.norm() for one, other in pairs]).detach()


def _waves(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers between -1 and 1 without a visible pattern."""
    return torch.sin(torch.arange(math.prod(shape), device=device, dtype=torch.float64) ** 1.5).reshape(shape)
