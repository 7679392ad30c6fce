"""Triton kernels of window attention: straight from the table of tokens, and no score is ever written to memory.

All kernels see a window as :class:`nnunet_ssl.architectures.windows.CompactPlan` lays it out: its real tokens first, as
many as its kind has. They attend to one another and to one further key, the *gathered* one, which stands for all
padding of the window. Padding places hold one vector, the projection's bias, so that for a query q with the biases b_j
of these places

    sum_j exp(q k / sqrt(d) + b_j) = exp(q k / sqrt(d) + log sum_j exp(b_j))

is exactly one term. Bias and the penalty of the roll's regions are a table by kind, head, row and column; scores are in
units of log 2, because exp2 is what a GPU computes.

A program owns what it writes and adds up in a fixed order, so there are no atomic additions and results repeat bit by
bit. Sizes that change from stage to stage are not compiled in: one compilation per type and head size serves a network.

With TRITON_INTERPRET=1 in the environment before Triton is imported, the kernels run on a CPU, slowly.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ["heads", "row_blocks", "places", "n_kinds"]
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(table, tokens, stride, column, D: tl.constexpr):
    """Load (rows, D) of one head; zeros where there is no token, which is -1."""
    offsets = tokens[:, None].to(tl.int64) * stride + column + tl.arange(0, D)[None, :]
    return tl.load(table + offsets, mask=tokens[:, None] >= 0, other=0.0)


@triton.jit
def _store_rows(table, tokens, stride, column, values, D: tl.constexpr):
    offsets = tokens[:, None].to(tl.int64) * stride + column + tl.arange(0, D)[None, :]
    tl.store(table + offsets, values.to(table.dtype.element_ty), mask=tokens[:, None] >= 0)


@triton.jit
def _per_token(tokens, heads, head):
    """Where a number per token and head lies."""
    return tokens.to(tl.int64) * heads + head


@triton.jit
def _table_rows(kind, heads, head, rows, n_rows):
    """Where rows of the tables by kind (or by group) and head begin, in units of rows."""
    return (kind.to(tl.int64) * heads + head) * n_rows + rows


@triton.jit(do_not_specialize=SIZES)
def build_table(
    bias, kinds, layouts, table, gathered, penalty, heads, row_blocks, places, M: tl.constexpr, N: tl.constexpr
):
    """Write the table (kinds, heads, rows, rows) and the bias of the gathered key (kinds, heads, rows).

    Columns that hold no real token are -inf, rows that hold none are unused. Grid: kinds, blocks of rows, heads.
    """
    kind, block, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_rows = row_blocks * 64
    length = tl.load(kinds + 3 * kind)
    layout = layouts + kind * 3 * places
    m = block * M + tl.arange(0, M)
    real = m < length
    place_m = tl.load(layout + m, mask=real, other=0)
    region_m = tl.load(layout + 2 * places + place_m)
    first = _table_rows(kind, heads, head, m, n_rows)
    top = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    for start in range(0, n_rows, N):
        n = start + tl.arange(0, N)
        place_n = tl.load(layout + n, mask=n < places, other=0)
        region_n = tl.load(layout + 2 * places + place_n)
        b = tl.load(bias + (head * places + place_m[:, None]).to(tl.int64) * places + place_n[None, :])
        b = (b + tl.where(region_m[:, None] != region_n[None, :], penalty, 0.0)) * LOG2_E
        column = tl.where((n < length)[None, :], b, float("-inf"))
        tl.store(table + first[:, None] * n_rows + n[None, :], column.to(table.dtype.element_ty))
        padding = tl.where(((n >= length) & (n < places))[None, :], b, float("-inf"))
        higher = tl.maximum(top, tl.max(padding, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(padding - higher[:, None]), 1)
        top = higher
    tl.store(gathered + first, tl.where(real, top + tl.log2(total), float("-inf")))


@triton.jit(do_not_specialize=SIZES)
def attend(
    qkv, padding, tokens, kind_of, kinds, table, gathered, out, lse, scale, heads, row_blocks,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Attended values (tokens, heads * D), and the log2 of each softmax's sum (tokens, heads).

    Grid: windows, blocks of rows, heads; programs that run together share a block of the table.
    """
    window, block, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_rows = row_blocks * 64
    width = heads * D
    kind = tl.load(kind_of + window)
    length = tl.load(kinds + 3 * kind)
    if block * M < length:
        of_window = tokens + window.to(tl.int64) * n_rows
        d = tl.arange(0, D)
        m = block * M + tl.arange(0, M)
        token_m = tl.load(of_window + m)
        q = _load_rows(qkv, token_m, 3 * width, head * D, D)
        first = _table_rows(kind, heads, head, m, n_rows)
        # The softmax begins with the gathered key. Without padding its score is -inf, and the next key wipes it out.
        k0 = tl.load(padding + width + head * D + d).to(tl.float32)
        v0 = tl.load(padding + 2 * width + head * D + d).to(tl.float32)
        top = tl.sum(q.to(tl.float32) * k0[None, :], 1) * scale + tl.load(gathered + first)
        total = tl.full([M], 1.0, tl.float32)
        sums = tl.zeros([M, D], tl.float32) + v0[None, :]
        for start in range(0, length, N):
            n = start + tl.arange(0, N)
            token_n = tl.load(of_window + n)
            k = _load_rows(qkv, token_n, 3 * width, width + head * D, D)
            v = _load_rows(qkv, token_n, 3 * width, 2 * width + head * D, D)
            b = tl.load(table + first[:, None] * n_rows + n[None, :]).to(tl.float32)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + b
            higher = tl.maximum(top, tl.max(s, 1))
            shrink = tl.exp2(top - higher)
            p = tl.exp2(s - higher[:, None])
            total = total * shrink + tl.sum(p, 1)
            sums = tl.dot(p.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
            top = higher
        _store_rows(out, token_m, width, head * D, sums / total[:, None], D)
        tl.store(lse + _per_token(token_m, heads, head), top + tl.log2(total), mask=token_m >= 0)


@triton.jit(do_not_specialize=SIZES)
def attend_backward(
    qkv, padding, tokens, kind_of, kinds, table, gathered, out, lse, d_out,
    delta, d_gathered, d_query, d_qkv, d_padding, scale, root, heads, row_blocks,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of query, key and value in one pass over the scores. Grid: windows, heads.

    Beside `d_qkv` (tokens, 3 * heads * D) it writes what the gradient of the bias needs, `delta` and `d_gathered`
    (tokens, heads); the gathered key's and value's gradients `d_padding` (windows, 2 * heads * D); and `d_query`
    (tokens, heads * D) in float32, where the gradients of queries are added up block by block. A program touches the
    tokens of its own window only, and its threads wait for each other between writing and reading.
    """
    window, head = tl.program_id(0), tl.program_id(1)
    n_rows = row_blocks * 64
    width = heads * D
    kind = tl.load(kind_of + window)
    length = tl.load(kinds + 3 * kind)
    of_window = tokens + window.to(tl.int64) * n_rows
    d = tl.arange(0, D)

    k0 = tl.load(padding + width + head * D + d).to(tl.float32)
    v0 = tl.load(padding + 2 * width + head * D + d).to(tl.float32)
    d_k0 = tl.zeros([D], tl.float32)
    d_v0 = tl.zeros([D], tl.float32)
    for start in range(0, length, M):
        m = start + tl.arange(0, M)
        token = tl.load(of_window + m)
        here = _per_token(token, heads, head)
        q = _load_rows(qkv, token, 3 * width, head * D, D).to(tl.float32)
        g = _load_rows(d_out, token, width, head * D, D).to(tl.float32)
        o = _load_rows(out, token, width, head * D, D).to(tl.float32)
        log_sum = tl.load(lse + here, mask=token >= 0, other=float("inf"))
        b = tl.load(gathered + _table_rows(kind, heads, head, m, n_rows))
        mean = tl.sum(g * o, 1)
        p = tl.exp2(tl.sum(q * k0[None, :], 1) * scale + b - log_sum)
        ds = p * (tl.sum(g * v0[None, :], 1) - mean)
        d_k0 += tl.sum(ds[:, None] * q, 0)
        d_v0 += tl.sum(p[:, None] * g, 0)
        tl.store(delta + here, mean, mask=token >= 0)
        tl.store(d_gathered + here, ds, mask=token >= 0)
        _store_rows(d_query, token, width, head * D, ds[:, None] * k0[None, :], D)
    of_padding = d_padding + window.to(tl.int64) * 2 * width + head * D + d
    tl.store(of_padding, d_k0 * root)
    tl.store(of_padding + width, d_v0)
    tl.debug_barrier()

    for start in range(0, length, N):
        n = start + tl.arange(0, N)
        token_n = tl.load(of_window + n)
        k = _load_rows(qkv, token_n, 3 * width, width + head * D, D)
        v = _load_rows(qkv, token_n, 3 * width, 2 * width + head * D, D)
        d_k = tl.zeros([N, D], tl.float32)
        d_v = tl.zeros([N, D], tl.float32)
        for row in range(0, length, M):
            m = row + tl.arange(0, M)
            token = tl.load(of_window + m)
            here = _per_token(token, heads, head)
            q = _load_rows(qkv, token, 3 * width, head * D, D)
            g = _load_rows(d_out, token, width, head * D, D)
            log_sum = tl.load(lse + here, mask=token >= 0, other=float("inf"))
            mean = tl.load(delta + here, mask=token >= 0, other=0.0)
            rows = _table_rows(kind, heads, head, m, n_rows)
            b = tl.trans(tl.load(table + rows[:, None] * n_rows + n[None, :])).to(tl.float32)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale + b  # keys in rows, so that p and ds are ready
            p = tl.exp2(s - log_sum[None, :])
            ds = p * (tl.dot(v, tl.trans(g), input_precision="ieee") - mean[None, :])
            d_v = tl.dot(p.to(g.dtype), g, d_v, input_precision="ieee")
            ds = ds.to(q.dtype)
            d_k = tl.dot(ds, q, d_k, input_precision="ieee")
            d_q = _load_rows(d_query, token, width, head * D, D)
            d_q += tl.dot(tl.trans(ds), k, input_precision="ieee")
            _store_rows(d_query, token, width, head * D, d_q, D)
        _store_rows(d_qkv, token_n, 3 * width, width + head * D, d_k * root, D)
        _store_rows(d_qkv, token_n, 3 * width, 2 * width + head * D, d_v, D)
        tl.debug_barrier()

    for start in range(0, length, M):
        token = tl.load(of_window + start + tl.arange(0, M))
        d_q = _load_rows(d_query, token, width, head * D, D)
        _store_rows(d_qkv, token, 3 * width, head * D, d_q * root, D)


@triton.jit(do_not_specialize=SIZES)
def table_backward(
    qkv, tokens, kinds, groups, table, lse, d_out, delta, d_gathered, d_table, d_gathered_sum, scale, heads, row_blocks,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of the table, summed over the windows of a group: (groups, heads, rows, rows); of the gathered key's
    bias: (groups, heads, rows). Grid: blocks of the table, groups, heads."""
    tile, group, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_rows = row_blocks * 64
    width = heads * D
    kind = tl.load(groups + 3 * group)
    length = tl.load(kinds + 3 * kind)
    columns = n_rows // N
    first_m = (tile // columns) * M
    first_n = (tile % columns) * N
    if (first_m < length) & (first_n < length):
        m = first_m + tl.arange(0, M)
        n = first_n + tl.arange(0, N)
        rows = _table_rows(kind, heads, head, m, n_rows)
        b = tl.load(table + rows[:, None] * n_rows + n[None, :]).to(tl.float32)
        sums = tl.zeros([M, N], tl.float32)
        gathered = tl.zeros([M], tl.float32)
        for window in range(tl.load(groups + 3 * group + 1), tl.load(groups + 3 * group + 2)):
            of_window = tokens + tl.cast(window, tl.int64) * n_rows
            token_m = tl.load(of_window + m)
            token_n = tl.load(of_window + n)
            here = _per_token(token_m, heads, head)
            q = _load_rows(qkv, token_m, 3 * width, head * D, D)
            g = _load_rows(d_out, token_m, width, head * D, D)
            k = _load_rows(qkv, token_n, 3 * width, width + head * D, D)
            v = _load_rows(qkv, token_n, 3 * width, 2 * width + head * D, D)
            log_sum = tl.load(lse + here, mask=token_m >= 0, other=float("inf"))
            mean = tl.load(delta + here, mask=token_m >= 0, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + b
            p = tl.exp2(s - log_sum[:, None])
            sums += p * (tl.dot(g, tl.trans(v), input_precision="ieee") - mean[:, None])
            gathered += tl.load(d_gathered + here, mask=token_m >= 0, other=0.0)
        own = _table_rows(group, heads, head, m, n_rows)
        tl.store(d_table + own[:, None] * n_rows + n[None, :], sums)
        if first_n == 0:
            tl.store(d_gathered_sum + own, gathered)


@triton.jit(do_not_specialize=SIZES)
def bias_backward(
    bias, kinds, layouts, gathered, d_table, d_gathered, d_bias, penalty, heads, row_blocks, places, n_kinds,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradient of the bias (heads, places, places) from those of the table. Grid: blocks of rows, of columns, heads."""
    head = tl.program_id(2)
    n_rows = row_blocks * 64
    i = tl.program_id(0) * M + tl.arange(0, M)
    j = tl.program_id(1) * N + tl.arange(0, N)
    inside = (i < places)[:, None] & (j < places)[None, :]
    at = (head * places + i[:, None]).to(tl.int64) * places + j[None, :]
    b = tl.load(bias + at, mask=inside, other=0.0)
    sums = tl.zeros([M, N], tl.float32)
    for kind in range(0, n_kinds):
        length = tl.load(kinds + 3 * kind)
        layout = layouts + kind * 3 * places
        row = tl.load(layout + places + i, mask=i < places, other=0)
        column = tl.load(layout + places + j, mask=j < places, other=0)
        apart = (
            tl.load(layout + 2 * places + i, mask=i < places, other=0)[:, None]
            != tl.load(layout + 2 * places + j, mask=j < places, other=0)[None, :]
        )
        real = (i < places) & (row < length)
        rows = (tl.cast(kind, tl.int64) * heads + head) * n_rows + row
        total = tl.load(gathered + rows, mask=real, other=0.0)
        share = tl.exp2((b + tl.where(apart, penalty, 0.0)) * LOG2_E - total[:, None])
        share = tl.where(
            inside & real[:, None] & (column >= length)[None, :], share, 0.0
        )  # of a padding place in the gathered key
        direct = inside & real[:, None] & (column < length)[None, :]
        for group in range(tl.load(kinds + 3 * kind + 1), tl.load(kinds + 3 * kind + 2)):
            own = (tl.cast(group, tl.int64) * heads + head) * n_rows + row
            sums += tl.load(d_table + own[:, None] * n_rows + column[None, :], mask=direct, other=0.0)
            sums += share * tl.load(d_gathered + own, mask=real, other=0.0)[:, None]
    tl.store(d_bias + at, sums, mask=inside)


INTERPRETED = not isinstance(attend, triton.JITFunction)
