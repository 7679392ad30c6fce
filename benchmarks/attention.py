"""Window attention of the Swin encoder: what each way has to do, counted, and on a GPU how long it takes.

    python benchmarks/attention.py                              the counts, on any machine
    python benchmarks/attention.py -device cuda -batch-size 8   and the times, forward and backward, under bfloat16

"rows" and "scores" are the shares that are left of a window's when its padding is left out. The ways: "kernels", the
operator; "PyTorch", the gathers and PyTorch's attention that serve where it does not.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pandas as pd
import torch
from tables import markdown
from torch import Tensor

from nnunet_ssl.architectures.window_attention import attend_by_pytorch, kernels_serve
from nnunet_ssl.architectures.window_operator import window_attention as operator
from nnunet_ssl.architectures.windows import WindowPlan, plan_windows

WINDOW = 7
STAGES = ((1, 3), (2, 6), (4, 12), (8, 24))
"""Of the paper's encoder: by what the finest grid is divided, and the heads, of 16 channels each."""

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """The attention of one Swin block."""

    name: str
    plan: WindowPlan
    inputs: list[Tensor]  # queries, keys and values; padding; bias

    def ways(self) -> dict[str, Way]:
        """Attended values of the inputs, by the operator and by PyTorch."""
        return {
            "kernels": lambda *inputs: operator(*inputs, *self.plan.compact)[0],
            "PyTorch": lambda *inputs: attend_by_pytorch(*inputs, self.plan),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("-batch-size", type=int, default=8)
    parser.add_argument("-size", type=int, default=96, help="edge of the patch, in voxels")
    arguments = parser.parse_args()
    rows = []
    for case in cases(arguments.size, arguments.batch_size, arguments.device, torch.bfloat16):
        row = {"blocks": case.name, **counts(case.plan)}
        if kernels_serve(arguments.device, torch.bfloat16, 16):
            row |= {f"{way}, ms": f"{one:.2f} + {other:.2f}" for way, (one, other) in times(case).items()}
        rows.append(row)
    print(markdown(pd.DataFrame(rows), 2))
    if arguments.device.type == "cuda":
        print(f"\n{torch.cuda.get_device_name(arguments.device)}, torch {torch.__version__}: forward + backward")


def cases(size: int, batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The plain and the shifted blocks of each stage of the paper's encoder, at patches of size^3."""
    generator = torch.Generator().manual_seed(0)
    for divisor, heads in STAGES:
        grid = (-(-size // 2 // divisor),) * 3
        for shifted in (False, True):
            plan = plan_windows(grid, WINDOW, shifted=shifted, batch=batch, device=device)
            shapes = [(batch * grid[0] ** 3, 48 * heads), (48 * heads,)]
            qkv, padding = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
            bias = torch.randn((heads, plan.length, plan.length), generator=generator).to(device)
            yield Case(f"{grid[0]}^3, {'shifted' if shifted else 'plain'}", plan, [qkv, padding, bias])


def counts(plan: WindowPlan) -> dict[str, float]:
    """What is left of rows and of scores without padding; the windows, and how many kinds of them there are."""
    lengths = plan.compact.kinds[plan.compact.kind_of.long(), 0].double() / plan.length
    return {
        "rows": float(lengths.mean()),
        "scores": float(lengths.square().mean()),
        "windows": len(plan.compact.tokens),
        "kinds": len(plan.compact.kinds),
    }


def times(case: Case, repeats: int = 10) -> dict[str, tuple[float, float]]:
    """Milliseconds of forward and backward pass, by way; medians."""
    return {name: _times(way, case.inputs, repeats) for name, way in case.ways().items()}


def _times(way: Way, inputs: list[Tensor], repeats: int) -> tuple[float, float]:
    inputs = [one.detach().requires_grad_() for one in inputs]
    measured: list[tuple[float, float]] = []
    for _ in range(repeats + 3):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        with torch.autocast("cuda", torch.bfloat16):
            out = way(*inputs)
        marks[1].record()
        torch.autograd.grad(out, inputs, torch.ones_like(out))
        marks[2].record()
        torch.cuda.synchronize()
        measured.append((marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])))
    forward, backward = zip(*measured[3:], strict=True)
    return statistics.median(forward), statistics.median(backward)


if __name__ == "__main__":
    main()
