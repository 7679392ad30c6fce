"""Numbers that change over training, as pure functions of the step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, steps: int, warmup: int, peak: float, floor: float) -> float:
    """Rise linearly to `peak` over `warmup` steps, then follow half a cosine down to `floor` at the last of `steps`.

    The first step already has ``peak / warmup``, so that no update is lost.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def ramp(step: int, *, start: int, end: int, low: float, high: float) -> float:
    """Stay at `low` until `start`, rise (or fall) linearly to `high` at `end`, stay there."""
    if step >= end:
        return high
    return low + (high - low) * max(0, step - start) / (end - start)
