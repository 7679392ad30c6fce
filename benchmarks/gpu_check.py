"""Does everything work on this GPU? A line per check, PASS or FAIL with what was measured; status 1 if any failed.

    python benchmarks/gpu_check.py -o gpu_check.md             at most five minutes, one GPU; about 8 GiB of its memory
    python benchmarks/gpu_check.py -device cpu                 the same at small size, to try the script itself
    python benchmarks/gpu_check.py --only attention recipe     the checks whose names begin so, and what they build on

Numbers are compared with the same computation on the CPU, in float64 where the device rounds. Fine-tunings are stock
`nnUNetv2_train` with nnU-Net's own default for torch.compile, on synthetic strokes: one per backbone, killed while the
encoder is frozen, continued with `--c` across the unfreeze, and asked to predict. The table at the end is Markdown, for
docs/performance.md.
"""

from __future__ import annotations

import argparse
import gc
import platform
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import gpu_finetuning as finetuning
import gpu_numbers as numbers
import gpu_pretraining as pretraining
import pandas as pd
import torch
from gpu_measures import BACKBONES, Check, Finding, Place
from tables import markdown

from nnunet_ssl.pretraining.recipes import recipes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("-o", type=Path, metavar="FILE.md", help="write the table here as well")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="checks, by how their names begin")
    arguments = parser.parse_args()
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU here; -device cpu tries the script without one.")

    started, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for name, check in checks(Place(arguments.device, Path(folder))):
            if name.startswith(("prepare", *arguments.only)):
                row = {"check": name, **run(check, arguments.device)}
                rows.append(row)
                print(f"{row['result']}  {name}: {row['measured']}  ({row['seconds']} s)", flush=True)
    failed = sum(row["result"] == "FAIL" for row in rows)
    summary = f"{machine(arguments.device)}; {len(rows)} checks, {failed} failed, {time.monotonic() - started:.0f} s"
    table = f"{summary}\n\n{markdown(pd.DataFrame(rows), 3)}\n"
    print(f"\n{table}")
    if arguments.o:
        arguments.o.write_text(table)
    raise SystemExit(1 if failed else 0)


def checks(place: Place) -> Iterator[tuple[str, Check]]:
    """Name every check, in the order in which they run; what others build on is called "prepare"."""
    yield "prepare: a corpus written, indexed, preprocessed", partial(pretraining.corpus_is_there, place)
    for backbone in BACKBONES:
        yield f"encoder {backbone}: float32 against float64", partial(numbers.encoder_is_exact, place, backbone)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = f"attention in one part and in many: {str(dtype).removeprefix('torch.')} against float64"
        yield name, partial(numbers.attention_is_exact, place, dtype)
        name = f"attention by the operator's kernels: {str(dtype).removeprefix('torch.')} against float64"
        yield name, partial(numbers.operator_is_exact, place, dtype)
    yield "attention by the operator's kernels, and by PyTorch: times", partial(numbers.operator_is_fast, place)
    for backbone in BACKBONES:
        yield f"encoder {backbone}: compiled as eager", partial(numbers.compiled_is_eager, place, backbone)
    for name, transform in numbers.transforms().items():
        yield f"augmentation: {name} as on the CPU", partial(numbers.transform_is_the_cpus, place, transform)
    yield "augmentation: noise as large as asked for, by its seed", partial(numbers.noise_is_sound, place)
    yield "augmentation: a whole batch as on the CPU", partial(numbers.augmentation_is_the_cpus, place)
    own = partial(numbers.finetuning_augmentation_is_the_cpus, place)
    yield "augmentation: a batch of fine-tuning as on the CPU", own
    for backbone in BACKBONES:
        for recipe in recipes():
            learns = partial(pretraining.recipe_learns, place, recipe, backbone)
            yield f"recipe {recipe}, {backbone}: all tensors move", learns
    yield "pre-training: stopped and continued", partial(pretraining.run_goes_on, place)
    yield "pre-training: too little memory, in one sentence", partial(pretraining.shortage_is_explained, place)
    yield "prepare: nnUNetv2_plan_and_preprocess", partial(finetuning.strokes_are_there, place)
    for backbone in BACKBONES:
        for name, check in finetuning.checks(place, backbone).items():
            yield f"fine-tuning {backbone}: {name}", check


def run(check: Check, device: torch.device) -> dict[str, str]:
    """Make a check. Whatever it raises is its own failure, told in one line."""
    started = time.monotonic()
    try:
        finding = check()
    except (Exception, SystemExit) as error:
        finding = Finding(False, f"{type(error).__name__}: {error}")
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        "result": {True: "PASS", False: "FAIL", None: "SKIP"}[finding.passed],
        "measured": " ".join(finding.measured.split())[:600].replace("|", "/"),
        "seconds": f"{time.monotonic() - started:.1f}",
    }


def machine(device: torch.device) -> str:
    """The device and the versions, for the table's caption."""
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        name = f"{torch.cuda.get_device_name(device)} ({memory:.0f} GiB, {bf16}), CUDA {torch.version.cuda}"
    packages = ", ".join(f"{package} {version(package)}" for package in ("nnunetv2", "monai", "nnunet_ssl"))
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}, {packages}"


if __name__ == "__main__":
    main()
