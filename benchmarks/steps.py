"""Training steps of several networks: timed in turn, so that whatever else the machine does meets all; their memory."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Hashable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

GIB = 2**30


class Step(Protocol):
    """A training step on a batch that is the same every time."""

    network: nn.Module
    device: torch.device

    def forward(self) -> Tensor:
        """Return the loss."""

    def __call__(self) -> None:
        """Forward and backward pass, and what else the benchmark counts to a step."""


Run = TypeVar("Run", bound=Hashable)


def seconds_per_step(steps: Mapping[Run, Step], rounds: int) -> dict[Run, str]:
    """Let all steps take turns, round by round; median [least-most] of each."""
    seconds: dict[Run, list[float]] = {run: [] for run in steps}
    for _ in range(rounds):
        for run, step in steps.items():
            seconds[run].append(_timed(step))
    return {
        run: f"{statistics.median(times):.3f} [{min(times):.3f}-{max(times):.3f}]" for run, times in seconds.items()
    }


def memory(step: Step) -> dict[str, float]:
    """GiB that a forward pass keeps for its backward pass, and on a GPU the most that a step held; also a warm-up.

    The latter is what a step adds to what other networks of this process hold, with its own weights.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in step.network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step.forward()
    step()
    figures = {"activations (GiB)": sum(kept.values()) / GIB}
    if step.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        weights = sum(parameter.nbytes for parameter in step.network.parameters())
        figures["peak (GiB)"] = (torch.cuda.max_memory_allocated() - before + weights) / GIB
    return figures


def machine(device: torch.device) -> str:
    """Where a table was made, for its caption."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {name}"


def _timed(step: Step) -> float:
    wait(step.device)
    start = time.perf_counter()
    step()
    wait(step.device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until a GPU has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
