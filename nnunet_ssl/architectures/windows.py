"""Which tokens attend to each other: the windows of a grid as index plans, and the gathers that use them.

Swin cuts the token grid into windows; every second block cuts a grid that is padded to whole windows and rolled by half
a window, and then tokens that only meet through the roll are kept apart by a penalty on their attention score. A
:class:`WindowPlan` says all of that in indices, so a block needs one gather in and one gather out instead of pad, roll,
partition, reverse, roll and crop. Windows are sorted by penalty: at most eight kinds exist (cut or not, along each
axis), so attention runs once per kind with a bias that broadcasts over windows.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnunet_ssl.architectures.compiling import real_tensors

Grid = tuple[int, int, int]

SEPARATION = -100.0
"""What is added to the score of two tokens that the roll alone brought together (the value Swin and MONAI use)."""


ROW_BLOCK = 64
"""A :class:`CompactPlan` has a multiple of these rows; a kernel treats a divisor of them at once."""

GROUPS = 16
"""Groups of windows that a :class:`CompactPlan` aims at. The gradient of the bias is summed up once for each of them:
with few groups a GPU is not busy, and each takes as much memory as the bias in float32."""


class CompactPlan(NamedTuple):
    """The windows of a :class:`WindowPlan` for kernels that leave padding out. All tensors are int32.

    Windows are of one kind if the roll cuts them alike and their padding lies in the same places; they are sorted by
    kind. Rows are the places of a window with the real tokens first, so that a kind with n of them has them in the
    rows 0 to n - 1.
    """

    tokens: Tensor  # (windows, rows): the token in each row, -1 beyond the last
    kind_of: Tensor  # (windows,)
    kinds: Tensor  # (kinds, 3): number of real tokens; first group; group after the last
    layouts: Tensor  # (kinds, 3, length): the place of each row, the row of each place, the region of each place
    groups: Tensor  # (groups, 3): kind; first window; window after the last


@dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """The windows of a batch of token grids, for tokens in one table of ``batch * tokens`` rows.

    A window has ``length`` tokens. Windows lie in one table of rows, sorted by kind, then window, then sample.
    """

    length: int
    windows_of_kind: tuple[int, ...]  # over the whole batch; their sum times `length` is the number of window rows
    penalties: tuple[Tensor | None, ...]  # per kind (length, length), added to the scores; None where nothing is cut
    token_of_row: Tensor  # (window rows,): the token in each window row; 0 in padding rows
    row_of_token: Tensor  # (tokens,): the window row of each token
    padding_rows: Tensor  # (padding rows,): the window rows that hold no token
    compact: CompactPlan


@torch.compiler.disable  # a plan is a constant of the graph's caller, not a part of the graph
@functools.lru_cache(maxsize=32)
def plan_windows(grid: Grid, window: int, *, shifted: bool, batch: int, device: torch.device) -> WindowPlan:
    """Return the plan for a batch of `grid`s; axes no longer than `window` get one window and no shift.

    Plans are cached per shape and device.
    """
    with real_tensors():
        return _build_plan(grid, window, shifted, batch, device)


def _build_plan(grid: Grid, window: int, shifted: bool, batch: int, device: torch.device) -> WindowPlan:
    sides = [min(size, window) for size in grid]
    shifts = [window // 2 if shifted and size > window else 0 for size in grid]
    counts = [-(-size // side) for size, side in zip(grid, sides, strict=True)]
    length, tokens = math.prod(sides), math.prod(grid)

    windows = _tokens_in_windows(grid, sides, shifts, counts)
    # Along a shifted axis only the last window is cut by the roll; the others are of the uncut kind.
    parts = [(slice(-1), slice(-1, None)) if shift else (slice(None),) for shift in shifts]
    kinds = [windows[x, y, z].reshape(-1, length) for x, y, z in itertools.product(*parts)]
    cuts = list(itertools.product(*[(False, True) if shift else (False,) for shift in shifts]))
    regions = [_regions(cut, sides, shifts) for cut in cuts]

    token = torch.cat(kinds)[:, None]  # (windows, 1, length) of one sample; `tokens` stands for padding
    row = torch.argsort(token.reshape(-1), stable=True)  # rows of tokens in token order, then the rows of padding
    sample = torch.arange(batch)[:, None]
    rows = (row // length * batch + sample) * length + row % length  # (batch, windows * length) in the whole table
    return WindowPlan(
        length=length,
        windows_of_kind=tuple(len(kind) * batch for kind in kinds),
        penalties=tuple(
            ((region[:, None] != region) * SEPARATION).to(device) if any(cut) else None
            for cut, region in zip(cuts, regions, strict=True)
        ),
        token_of_row=torch.where(token < tokens, token + sample * tokens, 0).reshape(-1).to(device),
        row_of_token=rows[:, :tokens].reshape(-1).to(device),
        padding_rows=rows[:, tokens:].reshape(-1).to(device),
        compact=CompactPlan(*(table.to(device) for table in _compact(kinds, regions, tokens, batch))),
    )


def _tokens_in_windows(grid: Grid, sides: list[int], shifts: list[int], counts: list[int]) -> Tensor:
    """Return (windows X, Y, Z, length): the flat token index in each place, or the number of tokens for padding."""
    index = torch.zeros((), dtype=torch.long)
    outside = torch.zeros((), dtype=torch.bool)
    for axis in range(3):
        padded = counts[axis] * sides[axis]
        place = (torch.arange(padded) + shifts[axis]) % padded
        shape = [1] * 6  # windows X, side X, windows Y, side Y, windows Z, side Z
        shape[2 * axis : 2 * axis + 2] = [counts[axis], sides[axis]]
        place = place.reshape(shape)
        index = index * grid[axis] + place
        outside = outside | (place >= grid[axis])
    index = torch.where(outside, math.prod(grid), index)
    return index.permute(0, 2, 4, 1, 3, 5).reshape(*counts, -1)


def _regions(cut: tuple[bool, ...], sides: list[int], shifts: list[int]) -> Tensor:
    """Number the regions (length,) into which the roll cuts a window along the axes in `cut`."""
    region = torch.zeros((), dtype=torch.long)
    for axis in range(3):
        beyond = torch.arange(sides[axis]) >= sides[axis] - shifts[axis]
        shape = [1, 1, 1]
        shape[axis] = sides[axis]
        region = region * 2 + (beyond & cut[axis]).reshape(shape)
    return region.reshape(-1)


def _compact(cut_kinds: list[Tensor], regions: list[Tensor], tokens: int, batch: int) -> CompactPlan:
    """Lay out windows (windows, length) of one sample, given for each way of being cut; `tokens` stands for padding."""
    token, region = torch.cat(cut_kinds), torch.stack(regions)
    length = token.shape[1]
    cut = torch.repeat_interleave(torch.tensor([len(kind) for kind in cut_kinds]))
    patterns, kind = torch.unique(torch.cat([cut[:, None], token == tokens], 1), dim=0, return_inverse=True)
    padding = patterns[:, 1:]
    places = torch.argsort(padding, dim=1, stable=True)
    layouts = torch.stack([places, torch.argsort(places, dim=1), region[patterns[:, 0]]], 1)

    by_kind = torch.argsort(kind, stable=True)
    token, kind = token[by_kind].gather(1, places[kind[by_kind]])[:, None], kind[by_kind]
    sample = torch.arange(batch)[:, None]
    rows = torch.full((len(kind), batch, -(-length // ROW_BLOCK) * ROW_BLOCK), -1)
    rows[..., :length] = torch.where(token < tokens, token + sample * tokens, -1)

    kinds: list[tuple[int, int, int]] = []
    groups: list[tuple[int, int, int]] = []
    window = 0
    at_once = -(-len(kind) * batch // GROUPS)
    for number, count in enumerate(torch.bincount(kind).tolist()):
        first, end = len(groups), window + count * batch
        groups += [(number, start, min(start + at_once, end)) for start in range(window, end, at_once)]
        kinds.append((length - int(padding[number].sum()), first, len(groups)))
        window = end
    return CompactPlan(
        tokens=rows.flatten(0, 1).int(),
        kind_of=kind.repeat_interleave(batch).int(),
        kinds=torch.tensor(kinds, dtype=torch.int32),
        layouts=layouts.int(),
        groups=torch.tensor(groups, dtype=torch.int32),
    )


class _ToWindows(torch.autograd.Function):
    """Tokens (rows, C) to window rows; padding rows hold `padding` (C,). Backward gathers too: no atomic additions."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, padding: Tensor, token_of_row: Tensor, row_of_token: Tensor, padding_rows: Tensor
    ) -> Tensor:
        ctx.save_for_backward(row_of_token, padding_rows)
        windows = tokens.index_select(0, token_of_row)
        if padding_rows.shape[0]:
            windows[padding_rows] = padding
        return windows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        row_of_token, padding_rows = ctx.saved_tensors
        padding = gradient.index_select(0, padding_rows).sum(0)
        return gradient.index_select(0, row_of_token), padding, None, None, None


class _FromWindows(torch.autograd.Function):
    """Window rows (rows, C) to tokens; what lies in padding rows is dropped."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor, token_of_row: Tensor, row_of_token: Tensor, padding_rows: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_row, padding_rows)
        return windows.index_select(0, row_of_token)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        token_of_row, padding_rows = ctx.saved_tensors
        windows = gradient.index_select(0, token_of_row)
        if padding_rows.shape[0]:
            windows[padding_rows] = 0
        return windows, None, None, None


def to_windows(tokens: Tensor, padding: Tensor, plan: WindowPlan) -> Tensor:
    """Gather tokens (batch * tokens, C) into windows (windows, length, C); padding places hold `padding` (C,)."""
    rows = _ToWindows.apply(tokens, padding, plan.token_of_row, plan.row_of_token, plan.padding_rows)
    return rows.reshape(-1, plan.length, tokens.shape[1])


def from_windows(windows: Tensor, plan: WindowPlan) -> Tensor:
    """Undo :func:`to_windows`: (windows, length, C) back to tokens (batch * tokens, C)."""
    rows = windows.reshape(-1, windows.shape[-1])
    return _FromWindows.apply(rows, plan.token_of_row, plan.row_of_token, plan.padding_rows)
