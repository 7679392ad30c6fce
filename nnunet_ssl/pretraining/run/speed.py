"""How fast a run goes, what it waits for, and how much memory it takes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nnunet_ssl.pretraining.views.streams import Stream


class Stopwatch:
    """Times intervals of steps; validation and checkpoints can be left out."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._restart()

    def _restart(self) -> None:
        self.started, self.waited, self.steps = time.perf_counter(), self.stream.waited, 0

    def step(self) -> None:
        """Count a step."""
        self.steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that the block takes."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def figures(self, steps_left: int) -> dict[str, float]:
        """Steps per second, share of time spent waiting for data, hours left and peak memory; begin a new interval."""
        seconds = time.perf_counter() - self.started
        per_second = self.steps / seconds
        figures = {
            "speed/steps_per_second": per_second,
            "speed/waiting": (self.stream.waited - self.waited) / seconds,
            "speed/hours_left": steps_left / per_second / 3600,
            "memory/peak_gib": peak_memory_gib(self.stream.device),
        }
        self._restart()
        return figures


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that tensors took on a GPU; elsewhere, this process in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
