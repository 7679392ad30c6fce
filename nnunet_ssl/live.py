"""One line that tells how far a long command is: rate, remaining time, and counts that deserve a look."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

SECONDS_IN_A_FILE = 60.0
"""Between two states of the line where it goes to a file, as a cluster's logs."""


@contextmanager
def live_line(
    what: str, total: int, *, unit: str, done: int = 0, smoothing: float = 0.0, shown: bool = True
) -> Iterator[tqdm]:
    """A line on standard error, below the log. ``update()`` counts, ``set_postfix(failed=3)`` adds counts.

    Args:
        what: is being done.
        total: of the units; none, and there is no line.
        done: of these, before.
        smoothing: 0 reckons the remaining time by the average so far, towards 1 by the latest units.
        shown: False for a line that is never printed.
    """
    if not (shown and total):
        yield tqdm(disable=True)
        return
    interval = 0.1 if sys.stderr.isatty() else SECONDS_IN_A_FILE
    with (
        logging_redirect_tqdm(),
        tqdm(
            desc=what,
            total=total,
            initial=done,
            unit=unit,
            smoothing=smoothing,
            mininterval=interval,
            maxinterval=max(interval, 10.0),
        ) as line,
    ):
        yield line
