"""SwinEncoder against MONAI's SwinTransformer of the same weights: time of a training step, peak memory, parameters.

Expected: on the CPU at least 1.5 times MONAI's speed with the C library's default allocator, and not slower when it is
told to keep the memory it once had; on a GPU, under bf16 autocast, at least twice MONAI's speed; less peak memory
everywhere.

    python benchmarks/encoder.py                                  96^3 and 128^3 on the CPU: about a quarter of an hour
    python benchmarks/encoder.py --sizes 32 --embed-dim 12 --repeats 3                                      a minute
    python benchmarks/encoder.py -device cuda --batch-size 8 --compile

A step is forward and backward of the mean square of all five maps. Steps of the two networks alternate, so that
whatever else the machine does meets both; the ratio is taken within each pair. Peak memory is measured in a process for
each network: the largest resident memory of a step on the CPU, PyTorch's own count on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from nnunet_ssl.commands import KEPT_MEMORY

ALLOCATORS = {"default": {}, "tuned": KEPT_MEMORY}
NETWORKS = ("monai", "ours")
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 128], metavar="N", help="edges in voxels")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="pairs of steps that are timed, after two that are not")
    parser.add_argument("--embed-dim", type=int, default=48)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="torch.compile ours; MONAI's stays as it is")
    parser.add_argument("--checkpointing", action="store_true", help="of the Swin blocks, in both networks")
    parser.add_argument("-device", default="cpu")
    parser.add_argument("-o", type=Path, metavar="FILE.json", help="write the figures here as well")
    parser.add_argument("--measure", choices=("time", *NETWORKS), help=argparse.SUPPRESS)  # what a child process does
    arguments = parser.parse_args()
    if arguments.measure:
        measured = time_steps(arguments) if arguments.measure == "time" else step_memory(arguments)
        print(json.dumps(measured))
        return
    print(machine(arguments))
    allocators = ALLOCATORS if arguments.device == "cpu" else {"default": {}}
    results = []
    for size in arguments.sizes:
        for allocator, variables in allocators.items():
            times = child(arguments, size, "time", variables)
            memory = {network: child(arguments, size, network, variables)["peak"] for network in NETWORKS}
            results.append({"size": size, "allocator": allocator, "times": times["seconds"], "memory": memory})
            print(row(results[-1], times["parameters"]), flush=True)
    if arguments.o:
        arguments.o.write_text(json.dumps({"machine": machine(arguments), "results": results}, indent=1))


def child(arguments: argparse.Namespace, size: int, measure: str, variables: dict[str, str]) -> dict:
    """Measure in a process of its own, whose allocator starts as `variables` say."""
    options = [f"--{name}={getattr(arguments, name.replace('-', '_'))}" for name in SHARED]
    flags = [f"--{name}" for name in ("compile", "checkpointing") if getattr(arguments, name)]
    command = [sys.executable, __file__, f"--sizes={size}", f"--measure={measure}", "-device", arguments.device]
    clean = {name: value for name, value in os.environ.items() if name not in KEPT_MEMORY}
    done = subprocess.run(
        [*command, *options, *flags], env=clean | variables, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


SHARED = ("batch-size", "repeats", "embed-dim", "threads")


def build(network: str, arguments: argparse.Namespace) -> nn.Module:
    from monai.networks.nets.swin_unetr import SwinTransformer

    from nnunet_ssl.architectures.compiling import compile_parts
    from nnunet_ssl.architectures.swin import DEPTHS, NUM_HEADS, SwinEncoder
    from nnunet_ssl.weights.monai_names import from_monai

    torch.manual_seed(0)
    width, depths, heads = arguments.embed_dim, DEPTHS, NUM_HEADS
    theirs = SwinTransformer(
        1, width, (7, 7, 7), (2, 2, 2), depths, heads, use_v2=True, use_checkpoint=arguments.checkpointing
    )
    if network == "monai":
        return theirs.to(arguments.device)
    ours = SwinEncoder(
        embed_dim=width,
        depths=depths,
        num_heads=heads,
        conv_norm="instance",
        mask_token=False,
        checkpointing=arguments.checkpointing,
    )
    state = theirs.state_dict()
    ours.load_state_dict({from_monai(name): state[name] for name in state if "relative_position_index" not in name})
    if arguments.compile:
        compile_parts(ours)
    return ours.to(arguments.device)


def step(network: nn.Module, x: torch.Tensor) -> None:
    network.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=x.is_cuda):
        maps = network(x)
    sum(level.float().square().mean() for level in maps).backward()
    if x.is_cuda:
        torch.cuda.synchronize()


def volumes(arguments: argparse.Namespace) -> torch.Tensor:
    torch.set_num_threads(arguments.threads)
    return torch.randn(arguments.batch_size, 1, *arguments.sizes * 3, device=arguments.device)


def time_steps(arguments: argparse.Namespace) -> dict:
    """Return the seconds of each step, by network, and the numbers of parameters."""
    x = volumes(arguments)
    networks = {name: build(name, arguments) for name in NETWORKS}
    seconds = {name: [] for name in NETWORKS}
    for repeat in range(-2, arguments.repeats):
        for name, network in networks.items():
            start = time.perf_counter()
            step(network, x)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    return {"seconds": seconds, "parameters": parameters}


def step_memory(arguments: argparse.Namespace) -> dict:
    """Return by how many bytes the second step of one network raises the memory above that of network and input."""
    x = volumes(arguments)
    network = build(arguments.measure, arguments)
    if x.is_cuda:
        before = torch.cuda.memory_allocated()
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            step(network, x)
        return {"peak": torch.cuda.max_memory_allocated() - before}
    before = resident("VmRSS")
    for _ in range(2):
        step(network, x)
    return {"peak": resident("VmHWM") - before}


def resident(entry: str) -> int:
    """Return this process' resident memory in bytes: now (VmRSS) or at its highest (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {entry}: peak memory on the CPU is measured on Linux only.")


def row(result: dict, parameters: dict[str, int]) -> str:
    monai, ours = (result["times"][name] for name in NETWORKS)
    ratios = [theirs / own for theirs, own in zip(monai, ours, strict=True)]
    memory = [result["memory"][name] / GIB for name in NETWORKS]
    return "\n".join(
        [
            f"{result['size']}^3, {result['allocator']} allocator; parameters {parameters['monai']:,} and "
            f"{parameters['ours']:,}",
            f"  MONAI {spread(monai, 's')}, ours {spread(ours, 's')}: ours is {spread(ratios, 'times')} as fast",
            f"  peak memory {memory[0]:.2f} GiB and {memory[1]:.2f} GiB: ours takes {memory[1] / memory[0]:.0%}",
        ]
    )


def spread(values: list[float], unit: str) -> str:
    return f"{statistics.median(values):.3g} {unit} [{min(values):.3g}-{max(values):.3g}]"


def machine(arguments: argparse.Namespace) -> str:
    device = f"{platform.machine()} CPU, {arguments.threads} threads, float32"
    if arguments.device != "cpu":
        device = f"{torch.cuda.get_device_name(arguments.device)}, bf16 autocast"
    return f"{device}; PyTorch {torch.__version__}, batch {arguments.batch_size}, medians [min-max]"


if __name__ == "__main__":
    main()
