"""Window attention as one operator of PyTorch's around the Triton kernels: torch.compile and torch.export see a node.

It reads queries, keys and values from the table of tokens, so that no window is ever gathered, and keeps for its
backward pass only them, its result, and one number per token and head. Whether it is used is decided in
:mod:`nnunet_ssl.architectures.window_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nnunet_ssl.architectures.windows import ROW_BLOCK, SEPARATION, CompactPlan

TYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_SIZES = (16, 32, 64)
LOG2_E = 1.4426950408889634

Shape = Sequence[int]


class Tiles(NamedTuple):
    """Rows and columns of scores that a program of each kernel treats at once."""

    attend: tuple[int, int]
    attend_backward: tuple[int, int]
    table_backward: tuple[int, int]


TILES = {16: Tiles((64, 64), (32, 64), (64, 64)), 32: Tiles((64, 64), (32, 64), (32, 64))}
"""By head size, in 16-bit types. Chosen by what a compiler tells without a GPU: large, but with all numbers in
registers, and with room for at least three programs on each of the GPU's processors (docs/performance.md)."""

TILES_OF_64 = {"Ampere, Ada": Tiles((32, 64), (32, 32), (32, 64)), "Hopper": Tiles((64, 64), (32, 64), (32, 64))}
"""Heads of 64 are the only ones for which generations differ."""

TILES_IN_FLOAT32 = {16: Tiles((32, 32), (32, 32), (32, 32)), 32: Tiles((16, 32), (16, 32), (16, 32))}
TILES_IN_FLOAT32[64] = TILES_IN_FLOAT32[32]

TABLE_TILE = (32, 32)
"""Of the kernels that go over biases and no scores."""


def tiles_for(qkv: Tensor, head_size: int) -> Tiles:
    """Choose tiles, for the type of the inputs and their device."""
    if qkv.dtype == torch.float32:
        return TILES_IN_FLOAT32[head_size]
    if head_size in TILES:
        return TILES[head_size]
    hopper = qkv.is_cuda and torch.cuda.get_device_capability(qkv.device) >= (9, 0)
    return TILES_OF_64["Hopper" if hopper else "Ampere, Ada"]


INPUTS = "Tensor qkv, Tensor padding, Tensor bias, " + ", ".join(f"Tensor {name}" for name in CompactPlan._fields)
"""Said to PyTorch in words: older releases do not read annotations that are text."""


@torch.library.custom_op("nnunet_ssl::window_attention", mutates_args=(), schema=f"({INPUTS}) -> (Tensor, Tensor)")
def window_attention(
    qkv: Tensor,
    padding: Tensor,
    bias: Tensor,
    tokens: Tensor,
    kind_of: Tensor,
    kinds: Tensor,
    layouts: Tensor,
    groups: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attend within windows.

    Args:
        qkv: queries, keys and values (tokens, 3 C), of a type in `TYPES` and with heads of a size in `HEAD_SIZES`.
        padding: what padding places hold in their stead (3 C,), of the same type.
        bias: (heads, length, length), in float32.
        tokens, kind_of, kinds, layouts, groups: a :class:`CompactPlan` of as many tokens.

    Returns:
        Attended values (tokens, C), and for the backward pass log2 of each softmax's sum (tokens, heads).

    Raises:
        ValueError: types or shapes do not fit each other.
    """
    from nnunet_ssl.architectures import window_kernels as kernels

    size = _check(qkv, padding, bias, layouts)
    plan = CompactPlan(tokens, kind_of, kinds, layouts, groups)
    qkv, padding, bias = qkv.contiguous(), padding.contiguous(), bias.contiguous()
    out, log_sums = _outputs(qkv, padding, bias, *plan)
    heads, n_rows, tile = len(bias), tokens.shape[1], tiles_for(qkv, size).attend
    with torch.cuda.device_of(qkv):
        table, gathered = _table(bias, plan, qkv.dtype)
        kernels.attend[len(tokens), n_rows // tile[0], heads](
            *(qkv, padding, tokens, kind_of, kinds, table, gathered, out, log_sums),
            *(size**-0.5 * LOG2_E, heads, n_rows // ROW_BLOCK),
            **_options(tile, D=size),
        )
    return out, log_sums


@window_attention.register_fake
def _outputs(qkv: Tensor, padding: Tensor, bias: Tensor, *plan: Tensor) -> tuple[Tensor, Tensor]:
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    return out, qkv.new_empty(qkv.shape[0], bias.shape[0], dtype=torch.float32)


@torch.library.custom_op(
    "nnunet_ssl::window_attention_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor out, Tensor log_sums, {INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def window_attention_backward(
    d_out: Tensor,
    out: Tensor,
    log_sums: Tensor,
    qkv: Tensor,
    padding: Tensor,
    bias: Tensor,
    *tables: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `qkv`, `padding` and `bias`, given that of the attended values."""
    from nnunet_ssl.architectures import window_kernels as kernels

    tokens, kind_of, kinds, layouts, groups = plan = CompactPlan(*tables)
    size = _check(qkv, padding, bias, layouts)
    d_out, out, log_sums, qkv, padding, bias = (one.contiguous() for one in (d_out, out, log_sums, qkv, padding, bias))
    heads, tiles, width = len(bias), tiles_for(qkv, size), len(bias) * size
    n_rows, scale = tokens.shape[1], size**-0.5 * LOG2_E
    sizes = (heads, n_rows // ROW_BLOCK)

    def in_float32(*shape: int) -> Tensor:
        return qkv.new_empty(shape, dtype=torch.float32)

    d_qkv, d_bias, d_query = qkv.new_empty(qkv.shape), in_float32(*bias.shape), in_float32(len(qkv), width)
    d_padding, delta, d_gathered = in_float32(len(tokens), 2 * width), *(in_float32(len(qkv), heads) for _ in range(2))
    with torch.cuda.device_of(qkv):
        table, gathered = _table(bias, plan, qkv.dtype)
        kernels.attend_backward[len(tokens), heads](
            *(qkv, padding, tokens, kind_of, kinds, table, gathered, out, log_sums, d_out),
            *(delta, d_gathered, d_query, d_qkv, d_padding, scale, size**-0.5, *sizes),
            **_options(tiles.attend_backward, D=size),
        )
        d_table, d_gathered_sum = in_float32(len(groups), heads, n_rows, n_rows), in_float32(len(groups), heads, n_rows)
        tile = tiles.table_backward
        kernels.table_backward[n_rows // tile[0] * (n_rows // tile[1]), len(groups), heads](
            *(qkv, tokens, kinds, groups, table, log_sums, d_out, delta, d_gathered, d_table, d_gathered_sum),
            *(scale, *sizes),
            **_options(tile, D=size),
        )
        kernels.bias_backward[n_rows // TABLE_TILE[0], n_rows // TABLE_TILE[1], heads](
            *(bias, kinds, layouts, gathered, d_table, d_gathered_sum, d_bias),
            *(SEPARATION, *sizes, bias.shape[1], len(kinds)),
            **_options(TABLE_TILE),
        )
    d_padding = torch.cat([d_padding.new_zeros(width), d_padding.sum(0)])  # nobody sees what padding asks for
    return d_qkv, d_padding.to(padding.dtype), d_bias


@window_attention_backward.register_fake
def _gradients(
    d_out: Tensor, out: Tensor, log_sums: Tensor, qkv: Tensor, padding: Tensor, bias: Tensor, *plan: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), padding.new_empty(padding.shape), bias.new_empty(bias.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *inputs)


def _differentiate(ctx: Any, d_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *window_attention_backward(d_out, *ctx.saved_tensors), None, None, None, None, None


window_attention.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.nnunet_ssl.window_attention)
def _flops(qkv: Shape, padding: Shape, bias: Shape, tokens: Shape, *plan: Shape, **options: Any) -> int:
    """Two matrix products, of whole windows: as PyTorch counts its own attention, though padding is left out."""
    heads, length, _ = bias
    return 4 * tokens[0] * heads * length**2 * (qkv[1] // 3 // heads)


@register_flop_formula(torch.ops.nnunet_ssl.window_attention_backward)
def _backward_flops(d_out: Shape, out: Shape, log_sums: Shape, *inputs: Shape, **options: Any) -> int:
    """Five products: the scores once more, and four gradients."""
    return _flops(*inputs) // 2 * 5


def _table(bias: Tensor, plan: CompactPlan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Biases and penalties by kind, head, row and column, in the type of the scores' inputs; the gathered key's."""
    from nnunet_ssl.architectures import window_kernels as kernels

    heads, n_kinds, n_rows = len(bias), len(plan.kinds), plan.tokens.shape[1]
    table = bias.new_empty(n_kinds, heads, n_rows, n_rows, dtype=dtype)
    gathered = bias.new_empty(n_kinds, heads, n_rows)
    kernels.build_table[n_kinds, n_rows // TABLE_TILE[0], heads](
        *(bias, plan.kinds, plan.layouts, table, gathered),
        *(SEPARATION, heads, n_rows // ROW_BLOCK, bias.shape[1]),
        **_options(TABLE_TILE),
    )
    return table, gathered


def _options(tile: tuple[int, int], **sizes: int) -> dict[str, int]:
    """What a kernel is compiled for. One stage: nothing is loaded ahead of what a program writes."""
    return {"M": tile[0], "N": tile[1], **sizes, "num_warps": 4, "num_stages": 1}


def _check(qkv: Tensor, padding: Tensor, bias: Tensor, layouts: Tensor) -> int:
    """Return the size of a head, if everything fits."""
    heads, length, columns = bias.shape
    size = qkv.shape[1] // (3 * heads)
    if qkv.dtype not in TYPES or padding.dtype != qkv.dtype or bias.dtype != torch.float32:
        raise ValueError(f"There is no kernel for {qkv.dtype}, padding in {padding.dtype}, bias in {bias.dtype}.")
    if size not in HEAD_SIZES or qkv.shape[1] != 3 * heads * size or padding.shape != qkv.shape[1:]:
        raise ValueError(f"Rows {tuple(qkv.shape)} with padding {tuple(padding.shape)} do not fit {heads} heads.")
    if length != columns or length != layouts.shape[2]:
        raise ValueError(f"The bias is {tuple(bias.shape)}, and the windows have {layouts.shape[2]} places.")
    return size
