"""Inputs of window attention, and PyTorch's own answer in float64, which every other way is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nnunet_ssl.architectures.window_attention import attend_by_pytorch
from nnunet_ssl.architectures.windows import WindowPlan


def draw(grid, plan: WindowPlan, *, batch=1, heads=2, size=16, dtype=torch.float32, spread=1.0) -> list[Tensor]:
    """Queries, keys and values; what padding holds; a bias of some spread."""
    generator = torch.Generator().manual_seed(0)
    width = 3 * heads * size
    shapes = [(batch * math.prod(grid), width), (width,), (heads, plan.length, plan.length)]
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [drawn[0], drawn[1], drawn[2].float() * spread]


def values_and_gradients(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The attended values, and the gradients of all inputs of a weighted sum of them."""
    inputs = [one.detach().requires_grad_() for one in inputs]
    out = attend(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


def assert_as_pytorch(attend: Callable[..., Tensor], inputs: list[Tensor], plan: WindowPlan, tolerance: float) -> None:
    """Relative by norm; a gradient counts as a hundredth of all of them at least: some are nothing but rounding."""
    own = values_and_gradients(attend, inputs)
    exact = values_and_gradients(lambda *doubles: attend_by_pytorch(*doubles, plan), [one.double() for one in inputs])
    floor = 0.01 * max(float(one.norm()) for one in exact[1:])
    for name, one, other in zip(("values", "qkv", "padding", "bias"), own, exact, strict=True):
        assert one.shape == other.shape
        error = (one.double() - other).norm() / max(float(other.norm()), floor)
        assert error <= tolerance, f"{name}: {error:.1e}"
