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
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int, int]

SEPARATION = -100.0
"""What is added to the score of two tokens that the roll alone brought together (the value Swin and MONAI use)."""


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


@torch.compiler.disable  # a plan is a constant of the graph's caller, not a part of the graph
@functools.lru_cache(maxsize=32)
def plan_windows(grid: Grid, window: int, *, shifted: bool, batch: int, device: torch.device) -> WindowPlan:
    """Return the plan for a batch of `grid`s; axes no longer than `window` get one window and no shift.

    Plans are cached per shape and device.
    """
    with torch.inference_mode(False):  # a plan first needed in inference must still serve training
        return _build_plan(grid, window, shifted, batch, device)


def _build_plan(grid: Grid, window: int, shifted: bool, batch: int, device: torch.device) -> WindowPlan:
    sides = [min(size, window) for size in grid]
    shifts = [window // 2 if shifted and size > window else 0 for size in grid]
    counts = [-(-size // side) for size, side in zip(grid, sides, strict=True)]
    length, tokens = math.prod(sides), math.prod(grid)

    windows = _tokens_in_windows(grid, sides, shifts, counts, device)
    # Along a shifted axis only the last window is cut by the roll; the others are of the uncut kind.
    parts = [(slice(-1), slice(-1, None)) if shift else (slice(None),) for shift in shifts]
    kinds = [windows[x, y, z].reshape(-1, length) for x, y, z in itertools.product(*parts)]
    penalties = [
        _penalty(cut, sides, shifts, device)
        for cut in itertools.product(*[(False, True) if shift else (False,) for shift in shifts])
    ]

    token = torch.cat(kinds)[:, None]  # (windows, 1, length) of one sample; `tokens` stands for padding
    row = torch.argsort(token.reshape(-1), stable=True)  # rows of tokens in token order, then the rows of padding
    sample = torch.arange(batch, device=device)[:, None]
    rows = (row // length * batch + sample) * length + row % length  # (batch, windows * length) in the whole table
    return WindowPlan(
        length=length,
        windows_of_kind=tuple(len(kind) * batch for kind in kinds),
        penalties=tuple(penalties),
        token_of_row=torch.where(token < tokens, token + sample * tokens, 0).reshape(-1),
        row_of_token=rows[:, :tokens].reshape(-1),
        padding_rows=rows[:, tokens:].reshape(-1),
    )


def _tokens_in_windows(
    grid: Grid, sides: list[int], shifts: list[int], counts: list[int], device: torch.device
) -> Tensor:
    """Return (windows X, Y, Z, length): the flat token index in each place, or the number of tokens for padding."""
    index = torch.zeros((), dtype=torch.long, device=device)
    outside = torch.zeros((), dtype=torch.bool, device=device)
    for axis in range(3):
        padded = counts[axis] * sides[axis]
        place = (torch.arange(padded, device=device) + shifts[axis]) % padded
        shape = [1] * 6  # windows X, side X, windows Y, side Y, windows Z, side Z
        shape[2 * axis : 2 * axis + 2] = [counts[axis], sides[axis]]
        place = place.reshape(shape)
        index = index * grid[axis] + place
        outside = outside | (place >= grid[axis])
    index = torch.where(outside, math.prod(grid), index)
    return index.permute(0, 2, 4, 1, 3, 5).reshape(*counts, -1)


def _penalty(cut: tuple[bool, ...], sides: list[int], shifts: list[int], device: torch.device) -> Tensor | None:
    """Return the (length, length) penalty of windows that the roll cuts along the axes in `cut`."""
    if not any(cut):
        return None
    region = torch.zeros((), dtype=torch.long, device=device)
    for axis in range(3):
        beyond = torch.arange(sides[axis], device=device) >= sides[axis] - shifts[axis]
        shape = [1, 1, 1]
        shape[axis] = sides[axis]
        region = region * 2 + (beyond & cut[axis]).reshape(shape)
    region = region.reshape(-1)
    return (region[:, None] != region[None, :]) * SEPARATION


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
