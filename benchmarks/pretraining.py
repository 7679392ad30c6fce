"""What an optimizer step costs: time, peak memory, and where the time goes, for a recipe and for changes to it.

Everything of a real step is in it: worker processes that read a synthetic store, augmentation on the device, the
passes, the update, moving average and queue. The time of a step is taken over steps that run freely; its parts over
further steps, with the device waited for at every border, so the parts of a GPU's step may add up to more. A batch that
does not fit the GPU comes in parts (accumulation). "to step 10" is the time from the start of the first step, with what
is compiled for it; what earlier runs left in the compilers' caches counts.

    python benchmarks/pretraining.py -device cuda --also bf16=false compile=false shared_pass=true checkpointing=true \\
        swin.window_size=6
    python benchmarks/pretraining.py --small --also shared_pass=true         a small encoder, for a CPU
    python benchmarks/pretraining.py -device cuda -c mim backbone=resenc     another recipe, settings for all rows
    python benchmarks/pretraining.py -device cuda --peer monai               and the same step around MONAI's encoder

The parts: "wait" for the workers; "augment"; "keys", the key network's pass; "forward" and "backward" of the query
network's passes, losses included; "update", the optimizer's; "average", of the key network; "queue". "measured" is a
whole step that takes each branch's gradient apart, as one in `gradients_every` does. Peak memory is what tensors took
on a GPU, and on a CPU the whole process, its libraries included.
"""

from __future__ import annotations

import argparse
import gc
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from loading import write_store
from peers import MonaiEncoder, monai_has_flash_attention
from tables import markdown

from nnunet_ssl.corpus.prepared import Corpus
from nnunet_ssl.pretraining import model as models
from nnunet_ssl.pretraining import step as steps
from nnunet_ssl.pretraining.config import PretrainingConfig, load_config
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.optimization import build_optimizer, schedules
from nnunet_ssl.pretraining.run.speed import peak_memory_gib
from nnunet_ssl.pretraining.views import streams

SMALL = [
    "swin.embed_dim=12",
    "swin.depths=1,1,1,1",
    "swin.num_heads=1,2,4,4",
    "swin.window_size=4",
    "patch_size=64",
    "batch_size=2",
    "masked.unpaired_batch_size=1",
    "workers=1",
]
PARTS = ("wait", "augment", "keys", "forward", "backward", "update", "average", "queue")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="for all rows")
    parser.add_argument("-c", default="mcl_mim", metavar="RECIPE", help="(default: mcl_mim)")
    parser.add_argument("--also", nargs="+", default=[], metavar="SETTINGS", help="a row for each: what it changes")
    parser.add_argument("--peer", choices=["monai"], help="rows with another encoder of the same sizes in our place")
    parser.add_argument("--small", action="store_true", help="a small encoder, patch and batch")
    parser.add_argument("-device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--steps", type=int, default=20, help="that are timed, after ten to warm up")
    parser.add_argument("--sessions", type=int, default=6, help="in the store, of two volumes each")
    arguments = parser.parse_args()

    common = [*(SMALL if arguments.small else []), *arguments.settings]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = store(Path(folder), arguments.sessions)
        runs = [(change, "") for change in ["", *arguments.also]]
        if arguments.peer:
            runs += [("", "MONAI's encoder")]
            runs += [("", "MONAI's encoder, fused attention")] if monai_has_flash_attention() else []
        for change, peer in runs:
            config = load_config(arguments.c, [*common, *change.split()])
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # nothing is left of the row before
                row = pool.submit(fitting, config, corpus, arguments.device, arguments.steps, peer).result()
            rows.append({"settings": peer or change or arguments.c, **row})
            print(markdown(pd.DataFrame(rows), 3), flush=True)
    device = torch.cuda.get_device_name(arguments.device) if arguments.device.type == "cuda" else platform.machine()
    print(f"\n{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; times in seconds")


def store(folder: Path, sessions: int) -> Corpus:
    """Volumes of real size; those of the last session cannot form a pair."""
    corpus = write_store(folder, sessions)
    scans = corpus.scans
    scans.loc[scans["session_index"] == scans["session_index"].max(), "modality"] = "unknown"
    return Corpus(corpus.folder, scans, corpus.preprocessing)


def fitting(
    config: PretrainingConfig, corpus: Corpus, device: torch.device, count: int, peer: str = ""
) -> dict[str, object]:
    """Measure with the batch in as few parts as the device's memory allows; around a peer's encoder if one is named."""
    while True:
        try:
            with encoder_of(peer, config):
                return measure(config, corpus, device, count)
        except torch.cuda.OutOfMemoryError:
            config = replace(config, accumulation=2 * config.accumulation)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def encoder_of(peer: str, config: PretrainingConfig) -> Iterator[None]:
    """Inside the block a learner has the peer's encoder, and nothing is compiled; ours where no peer is named."""
    if not peer:
        yield
        return

    def build(architecture: Mapping[str, Any]) -> MonaiEncoder:
        if architecture["backbone"] != "swin":
            raise SystemExit(f"MONAI has no encoder of backbone {architecture['backbone']}: leave out --peer.")
        return MonaiEncoder(architecture, checkpointing=config.checkpointing, flash="fused" in peer)

    with patch.object(models, "build_encoder", build), patch.object(models, "compile_parts", lambda encoder: None):
        yield


def measure(config: PretrainingConfig, corpus: Corpus, device: torch.device, count: int) -> dict[str, object]:
    """Time, memory and parts of a step of one configuration."""
    learner = Learner(config, device)
    optimizer = build_optimizer(learner.query, config)
    stream = streams.Stream(corpus, config, device=device, start=0, workers=config.workers)
    schedule = schedules(0, config)

    def run(number: int, *, measured: bool = False) -> float:
        """Seconds per step."""
        synchronise(device)
        started = time.perf_counter()
        for _ in range(number):
            steps.training_step(learner, optimizer, stream, schedule, measured=measured)
        synchronise(device)
        return (time.perf_counter() - started) / number

    tenth = 10 * run(10)
    free = run(count)
    with clock(optimizer, device) as seconds:
        waited = stream.waited
        run(count)
        seconds["wait"] = stream.waited - waited
    run(1, measured=True)  # whatever is to be compiled for it
    apart = run(max(1, count // 4), measured=True)
    return {
        "batch": f"{config.batch_size}" + (f" in {config.accumulation} parts" if config.accumulation > 1 else ""),
        "s/step": free,
        "200k steps, h": free * 200_000 / 3600,
        "to step 10": tenth,
        "peak GiB": peak_memory_gib(device),
        **{part: seconds[part] / count for part in PARTS},
        "measured": apart,
    }


@contextmanager
def clock(optimizer: torch.optim.Optimizer, device: torch.device) -> Iterator[dict[str, float]]:
    """Inside the block the parts of a step add the seconds they take to the dictionary that is yielded."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(part: str, work: Callable) -> Callable:
        def run(*args, **kwargs):
            synchronise(device)
            started = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                synchronise(device)
                seconds[part] += time.perf_counter() - started

        return run

    def timed_passes(*args, **kwargs) -> Iterator:
        passes = iter(query_passes(*args, **kwargs))
        following = timed("forward", lambda: next(passes, None))
        return iter(following, None)

    query_passes = steps.query_passes
    with ExitStack() as stack:
        for owner, name, part in (
            (streams, "augment", "augment"),
            (steps, "key_pass", "keys"),
            (steps, "backward", "backward"),
            (optimizer, "step", "update"),
            (steps, "move_towards", "average"),
            (steps, "remember", "queue"),
        ):
            stack.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        stack.enter_context(patch.object(steps, "query_passes", timed_passes))
        yield seconds


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
