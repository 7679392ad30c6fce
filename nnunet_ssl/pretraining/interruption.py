"""Requests to stop: SIGTERM and SIGUSR1, as SLURM sends them before it takes the machine away."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_NOT_FOR_HELPERS = (*SIGNALS, signal.SIGINT) if hasattr(signal, "sigwaitinfo") else ()  # macOS lacks the call


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Inside the block these signals are noted and nothing else; yield a function that tells whether one came."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Processes that start inside the block are born deaf to requests to stop; here these wait until its end.

    SLURM and a terminal signal every process of a job, and a helper that dies takes the training with it before the
    checkpoint is written. Helpers call :func:`exit_on_parents_signal` as soon as they can.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_HELPERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exit_on_parents_signal() -> None:
    """In a helper that was started shielded: leave at once when the parent asks, and when nobody else does.

    Whoever joins its helpers at exit, as multiprocessing does, would wait for ever for one that is deaf to all.
    """

    def listen() -> None:
        while signal.sigwaitinfo(_NOT_FOR_HELPERS).si_pid != os.getppid():
            pass
        os._exit(0)

    if _NOT_FOR_HELPERS:
        threading.Thread(target=listen, daemon=True).start()
