"""Augmentation of whole batches against one view after the other: what a GPU is asked for, and a CPU's time.

    python benchmarks/augmentation.py
    python benchmarks/augmentation.py --views 16 --patches 2 --size 64 --rounds 3

"Operators" are those that a GPU would be asked for (launches.py), without noise: each view that draws noise asks for
one more, in either way. "CPU" is processor time on one thread, median [least-most] of rounds in which both ways take
turns; `--timed` views are enough for it. Fine-tuning's peer is nnU-Net's own, which has no operators on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from launches import META, launches
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tables import markdown

from nnunet_ssl.pretraining.views import spatial
from nnunet_ssl.pretraining.views.augmentation import (
    AugmentationConfig,
    RawBatch,
    augment,
    draw_intensities,
    draw_matrix,
)
from nnunet_ssl.trainers.augmentation import BatchAugmentation

SHAPE = (160, 200, 170)
ANGLES = (-np.pi / 6, np.pi / 6)
LABELS = [0, 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=72, help="of a step of pre-training")
    parser.add_argument("--patches", type=int, default=8, help="of a step of fine-tuning")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--timed", type=int, default=16, help="views and patches for the CPU's time")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    rows = [
        row(f"pre-training, {arguments.views} views", *pretraining(arguments), arguments.rounds),
        row(f"fine-tuning, {arguments.patches} patches", *finetuning(arguments), arguments.rounds),
    ]
    print(f"torch {torch.__version__}, {arguments.size}^3, CPU: {arguments.timed} views, {arguments.rounds} rounds\n")
    print(markdown(pd.DataFrame(rows), 2))


def row(
    what: str, operators: Sequence[object], ways: Sequence[Callable[[], object]], views: int, rounds: int
) -> dict[str, object]:
    """Let both ways take turns; a ratio above 1 says that batches are faster."""
    seconds = np.array([[_timed(way) / views for way in ways] for _ in range(rounds + 1)])[1:]
    return {
        "": what,
        "operators, one by one": operators[0],
        "operators, batched": operators[1],
        "CPU one by one (ms a view)": _spread(1e3 * seconds[:, 0]),
        "CPU batched (ms a view)": _spread(1e3 * seconds[:, 1]),
        "ratio": _spread(seconds[:, 0] / seconds[:, 1]),
    }


def pretraining(arguments: argparse.Namespace) -> tuple[list[object], list[Callable[[], object]], int]:
    """The paper's augmentation, as the training device does it."""
    quiet = batch(arguments.views, arguments.size, "meta")
    quiet.intensities = [replace(one, noise=None) for one in quiet.intensities]
    one_by_one = sum(launches(lambda one=one: augment(one, META), META).total() for one in parts(quiet))
    operators = [one_by_one, launches(lambda: augment(quiet, META), META).total()]

    raw = batch(arguments.timed, arguments.size, "cpu")
    alone = parts(raw)

    def at_once() -> None:
        one_by_one, spatial.VOXELS_AT_ONCE["cpu"] = spatial.VOXELS_AT_ONCE["cpu"], spatial.VOXELS_AT_ONCE["gpu"]
        augment(raw, "cpu")
        spatial.VOXELS_AT_ONCE["cpu"] = one_by_one

    return operators, [lambda: [augment(one, "cpu") for one in alone], at_once], arguments.timed


def batch(views: int, size: int, device: str) -> RawBatch:
    """Views as a loader draws them, of noise."""
    rng, config, patch_size = np.random.default_rng(0), AugmentationConfig(), (size,) * 3
    matrices = np.array([draw_matrix(config, None, (1, 1, 1), rng) for _ in range(views)])
    centres = np.array([[rng.uniform(size / 2, length - size / 2) for length in SHAPE] for _ in range(views)])
    boxes = np.array([spatial.source_box(*one, patch_size, SHAPE) for one in zip(matrices, centres)])
    sizes = boxes[:, :, 1] - boxes[:, :, 0]
    return RawBatch(
        voxels=torch.randn(int(sizes.prod(axis=1).sum()), device=device).half(),
        sizes=sizes,
        matrices=matrices,
        centres=centres,
        origins=boxes[:, :, 0],
        intensities=[draw_intensities(config, rng) for _ in range(views)],
        patch_size=patch_size,
        subject=np.zeros(views, int),
        session=np.zeros(views, int),
        modality=np.zeros((1, views), int),
        scan_ids=[[""] * views],
        step=0,
    )


def parts(raw: RawBatch) -> list[RawBatch]:
    """Each view as a batch of its own."""
    crops = raw.voxels.split(raw.sizes.prod(axis=1).tolist())
    names = ("sizes", "matrices", "centres", "origins", "intensities", "subject", "session")
    return [
        replace(
            raw,
            voxels=crop,
            modality=raw.modality[:, n : n + 1],
            **{name: getattr(raw, name)[n : n + 1] for name in names},
        )
        for n, crop in enumerate(crops)
    ]


def finetuning(arguments: argparse.Namespace) -> tuple[list[object], list[Callable[[], object]], int]:
    """nnU-Net's augmentation, one channel and two labels: nnU-Net's transforms, and ours with what these draw."""
    patch_size = (arguments.size,) * 3
    transforms = nnUNetTrainer.get_training_transforms(patch_size, ANGLES, None, (0, 1, 2), False)
    augmentation = BatchAugmentation(transforms, LABELS)
    size = tuple(map(int, get_patch_size(patch_size, *[ANGLES] * 3, (0.85, 1.25))))

    def patches(count: int, device: str) -> list[torch.Tensor]:
        images = torch.randn(count, 1, *size, device=device)
        return [images, (images > 1).to(torch.int16)]

    np.random.seed(0)  # noqa: NPY002 (nnU-Net draws from it)
    torch.manual_seed(0)
    drawn = augmentation.draw(arguments.patches, 1, size)
    noise = [type(getattr(each, "transform", each)).__name__ for each in augmentation.transforms].index(
        "GaussianNoiseTransform"
    )
    drawn[noise] = [None] * arguments.patches
    far = patches(arguments.patches, "meta")
    batched = launches(lambda: augmentation.apply(*far, drawn), META).total()
    images, labels = patches(arguments.timed, "cpu")
    ways = [
        lambda: [transforms(image=one.clone(), segmentation=label) for one, label in zip(images, labels)],
        lambda: augmentation({"data": images.clone(), "target": labels}, torch.device("cpu")),
    ]
    return ["", batched], ways, arguments.timed


def _timed(way: Callable[[], object]) -> float:
    started = time.process_time()
    way()
    return time.process_time() - started


def _spread(values: np.ndarray) -> str:
    return f"{statistics.median(values):.2f} [{values.min():.2f}-{values.max():.2f}]"


if __name__ == "__main__":
    main()
