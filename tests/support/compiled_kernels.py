"""Let Triton compile for a GPU that is not there, whatever would be launched on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel


@contextmanager
def compiling_for(generation: int) -> Iterator[dict[str, list[CompiledKernel]]]:
    """Inside the block kernels are compiled and not launched: what they were to write stays as it is.

    Args:
        generation: ten times the compute capability, 90 for Hopper.

    Yields:
        What was compiled, by kernel; a launch that finds its compilation adds none.
    """
    compiled: dict[str, list[CompiledKernel]] = {}
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *arguments, grid, warmup, **options) -> None:
        one = run(kernel, *arguments, grid=grid, warmup=True, **options)
        known = compiled.setdefault(kernel.fn.__name__, [])
        if all(one is not other for other in known):
            known.append(one)

    # Devices of another number, or kernels that were compiled for one generation would be taken for the next.
    target = GPUTarget("cuda", generation, 32)
    ask = {"get_current_target": lambda: target, "get_current_device": lambda: generation}
    active = SimpleNamespace(**ask, get_current_stream=lambda device: 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr("triton.runtime.jit.driver", SimpleNamespace(active=active))
        yield compiled
