"""Several processes as one: start or join them, exchange keys, average gradients.

Gradients are averaged here and not by DistributedDataParallel: a step runs several forward and backward passes, some of
which need their gradients apart, and one averaging of all gradients at the end (80 MB for the paper's encoder) costs
milliseconds beside them. Every function does the obvious thing when there is one process.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from nnunet_ssl.console import command
from nnunet_ssl.devices import find_device
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.interruption import SIGNALS


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes the files."""
    return rank() == 0


def gather(tensor: Tensor, dim: int = 0) -> Tensor:
    """Concatenate the tensors of all ranks, in their order; they have one shape. Without gradient."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts, dim=dim)


def same_everywhere(*numbers: int, device: torch.device) -> bool:
    """Whether all ranks have the same numbers, each below 2**63."""
    rows = gather(torch.tensor([numbers], device=device))
    return bool((rows == rows[0]).all())


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, in place, in one exchange."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


def any_rank(*flags: bool | Tensor, device: torch.device) -> list[bool]:
    """Which of `flags` are true on some rank, in one exchange: all ranks get the same answers and act at the same step.

    Args:
        flags: numbers or scalar tensors that are true or false.
        device: of this process.
    """
    if world_size() == 1:
        return [bool(flag) for flag in flags]
    counts = torch.stack([torch.as_tensor(flag, device=device).int() for flag in flags])
    dist.all_reduce(counts)
    return [count > 0 for count in counts.tolist()]


def launch(work: Callable[..., None], arguments: tuple[Any, ...], *, processes: int, device: str) -> None:
    """Run ``work(*arguments, device)``: in this process, in `processes` new ones, or as one of those torchrun started.

    Raises:
        UserError: more GPUs are asked for than there are, or both torchrun and `processes` say how many.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if processes > 1:
            raise UserError(
                f"Under torchrun leave out -num_gpus {processes}: torchrun says how many processes there are."
            )
        _check_gpus(device, int(os.environ["LOCAL_WORLD_SIZE"]))
        _join(int(os.environ["LOCAL_RANK"]), work, arguments, device)
        return
    _check_gpus(device, processes)
    if processes == 1:
        work(*arguments, find_device(device))
    else:
        _spawn(work, arguments, processes, device)


def _check_gpus(device: str, processes: int) -> None:
    present = torch.cuda.device_count()
    if torch.device(device).type == "cuda" and present < processes:
        way_out = f"-num_gpus {present}" if present else "-device cpu"
        raise UserError(
            f"{processes} {'GPU is' if processes == 1 else 'GPUs are'} asked for and {present} can be seen. "
            f"Use {way_out}, or check the driver and CUDA_VISIBLE_DEVICES."
        )


def _spawn(work: Callable[..., None], arguments: tuple[Any, ...], processes: int, device: str) -> None:
    """Start the processes and pass on to them the signals that ask for a checkpoint."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["MASTER_PORT"] = str(_free_port())
    os.environ["WORLD_SIZE"] = str(processes)
    context = mp.spawn(_spawned, (work, arguments, device), nprocs=processes, join=False)

    def pass_on(number: int, frame: Any) -> None:
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException:  # it has said why
        sys.exit(1)


@command
def _spawned(index: int, work: Callable[..., None], arguments: tuple[Any, ...], device: str) -> None:
    os.environ["RANK"] = str(index)
    _join(index, work, arguments, device)


def _join(local_rank: int, work: Callable[..., None], arguments: tuple[Any, ...], device: str) -> None:
    """Enter the process group that the environment describes and do the work."""
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    logging.getLogger("nnunet_ssl").setLevel(logging.INFO if is_main() else logging.WARNING)
    try:
        work(*arguments, place)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
