"""Attention with a bias that all windows share, without keeping the scores of all windows in memory.

PyTorch's fused kernels do that on GPUs, but for the gradient of a bias that is trained: they write it window by window
before it is summed, so windows go to them in parts. On the CPU the fused kernel takes no bias that is trained, and the
unfused one keeps a matrix of scores per window and head: more than half of all memory. There the backward pass computes
the scores again, for a few windows at a time, so that they stay in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SCORES_PER_THREAD = 4 << 20
"""Bytes of scores that the backward pass on the CPU treats at once for each thread; they should fit into its cache."""

SCORES_PER_PART = 1 << 30
"""Scores that a GPU's backward pass treats at once where the bias is trained; their gradients are 2 GiB in bfloat16.

Forty views of 96^3 have 40 * 7^3 = 13,720 windows in the first stage, each with 3 heads and 343 x 343 scores: 4.8e9.
"""


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Scaled dot-product attention; query, key, value: (windows, heads, length, d), bias: (heads, length, length)."""
    trained = torch.is_grad_enabled() and bias.requires_grad
    if query.device.type == "cpu" and trained:
        return _RecomputedAttention.apply(query, key, value, bias)
    if query.device.type == "cuda" and trained:
        return _attention_in_parts(query, key, value, bias, max(1, SCORES_PER_PART // bias.numel()))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None])


def _attention_in_parts(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, windows: int) -> Tensor:
    """The same, `windows` windows at a time; autograd adds up the gradients of the bias."""
    parts = zip(query.split(windows), key.split(windows), value.split(windows), strict=True)
    attended = [F.scaled_dot_product_attention(*part, attn_mask=bias[None]) for part in parts]
    return attended[0] if len(attended) == 1 else torch.cat(attended)


class _RecomputedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        bias = bias.detach().to(query.dtype)  # the fused kernel takes no bias that is trained
        ctx.save_for_backward(query, key, value, bias)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, bias = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        d_query, d_key, d_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        d_bias = torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32))
        step = max(1, SCORES_PER_THREAD * torch.get_num_threads() // (bias.numel() * bias.element_size()))
        for start in range(0, len(query), step):
            part = slice(start, start + step)
            q, k, v, g = query[part] * scale, key[part], value[part], gradient[part]
            weights = (q @ k.mT).add_(bias).softmax(-1)
            d_value[part] = weights.mT @ g
            d_scores = torch.ops.aten._softmax_backward_data(g @ v.mT, weights, -1, weights.dtype)
            d_query[part] = (d_scores @ k).mul_(scale)
            d_key[part] = d_scores.mT @ q
            d_bias += d_scores.sum(0)
        return d_query, d_key, d_value, d_bias
