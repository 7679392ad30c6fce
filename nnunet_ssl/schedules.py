"""Numbers that change over training, as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nnunet_ssl.errors import UserError


def warmup_cosine(step: int, *, steps: int, warmup: int, peak: float, floor: float) -> float:
    """Rise linearly to `peak` over `warmup` steps, then follow half a cosine down to `floor` at the last of `steps`.

    The first step already has ``peak / warmup``, so that no update is lost.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def warmup_poly(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Rise linearly to `peak` over `warmup` steps, then fall to 0 as nnU-Net's ``PolyLRScheduler`` does.

    The first step already has ``peak / warmup``, so that no update is lost.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * max(0.0, 1 - (step - warmup) / (steps - warmup)) ** 0.9


def ramp(step: int, *, start: int, end: int, low: float, high: float) -> float:
    """Stay at `low` until `start`, rise (or fall) linearly to `high` at `end`, stay there."""
    if step >= end:
        return high
    return low + (high - low) * max(0, step - start) / (end - start)


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A number that stays at `low`, goes linearly to `high` between two shares of the training, and stays there."""

    low: float
    high: float
    begin: float = 0.0  # share of the steps
    until: float = 0.0  # share of the steps

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.until <= 1:
            raise UserError(
                f"a ramp must have 0 <= begin <= until <= 1 (shares of the steps), not {self.begin} and {self.until}."
            )

    def at(self, step: int, steps: int) -> float:
        """The value at `step` of `steps`."""
        return ramp(step, start=int(self.begin * steps), end=int(self.until * steps), low=self.low, high=self.high)
