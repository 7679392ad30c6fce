"""How fast nnU-Net's workers feed a training: with its augmentation in the workers, or on the training device.

Both ways read the same synthetic data set (volumes of 160 x 200 x 170 in nnU-Net's preprocessed format, in the page
cache), with nnU-Net's own loader, transforms and number of cached batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy.ndimage import zoom
from steps import wait

from nnunet_ssl.trainers.augmentation import BatchAugmentation

SHAPE, CASES = (160, 200, 170), 4
ANGLES = (-np.pi / 6, np.pi / 6)
AXES = (0, 1, 2)
LABELS = LabelManager({"background": 0, "lesion": 1}, None)
WARM_UP = 2
Train = Callable[[torch.Tensor, torch.Tensor], None]


def write_cases(folder: Path) -> None:
    """Write cases as nnU-Net's preprocessing does: smooth noise, and a ball of label 1."""
    for case in range(CASES):
        rng = np.random.default_rng(case)
        image = zoom(rng.normal(size=[size // 8 + 1 for size in SHAPE]), 8, order=1)[tuple(map(slice, SHAPE))]
        image = (image + rng.normal(0, 0.1, SHAPE)).astype(np.float32)[None]
        ball = sum((n - rng.integers(40, 120)) ** 2 for n in np.ogrid[tuple(map(slice, SHAPE))]) < 20**2
        places = np.argwhere(ball[None])
        blocks, chunks = comp_blosc2_params(image.shape, (96, 96, 96), 4)
        nnUNetDatasetBlosc2.save_case(
            image, ball.astype(np.int8)[None], {"class_locations": {1: places[:: max(1, len(places) // 10_000)]}},
            str(folder / f"case_{case}"), chunks=chunks, blocks=blocks,
        )  # fmt: skip


def feed(
    folder: Path, *, on_device: bool, size: int, batch_size: int, workers: int, device: torch.device, steps: int,
    train: Train,
) -> dict[str, Any]:  # fmt: skip
    """Train for so many steps, and drain the workers of as many batches; the first few of each are not counted.

    Returns:
        Patches per second of training, the share of it in which the device had nothing to do but wait for workers,
        milliseconds of augmentation on the device for a batch, and patches per second of workers whom nothing stops.
    """
    patch_size = (size,) * 3
    transforms = nnUNetTrainer.get_training_transforms(patch_size, ANGLES, None, AXES, False)
    loader = nnUNetDataLoader(
        nnUNetDatasetBlosc2(str(folder)),
        batch_size,
        get_patch_size(patch_size, *[ANGLES] * 3, (0.85, 1.25)),  # nnU-Net's
        patch_size,
        LABELS,
        oversample_foreground_percent=0.5,
        transforms=None if on_device else transforms,
    )
    augmentation = BatchAugmentation(transforms, LABELS.all_labels)
    batches = NonDetMultiThreadedAugmenter(
        loader, None, workers, max(6, workers // 2), pin_memory=device.type == "cuda", wait_time=0.002
    )
    seconds = np.zeros((steps + WARM_UP, 3))  # waiting, augmentation, training
    try:
        for row in seconds:
            marks = [time.perf_counter()]
            batch = next(batches)
            marks.append(time.perf_counter())
            batch = augmentation(batch, device) if on_device else batch
            images, labels = (batch[key].to(device, non_blocking=True) for key in ("data", "target"))
            wait(device)
            marks.append(time.perf_counter())
            train(images, labels)
            wait(device)
            marks.append(time.perf_counter())
            row[:] = np.diff(marks)
        drained = _drain(batches, steps, batch_size)
    finally:
        batches._finish()
    waiting, augmenting, training = seconds[WARM_UP:].sum(axis=0)
    total = waiting + augmenting + training
    return {
        "patches/s": steps * batch_size / total,
        "waiting": f"{waiting / total:.0%}",
        "augmentation (ms/batch)": 1e3 * augmenting / steps if on_device else float("nan"),
        "workers alone (patches/s)": drained,
    }


def _drain(batches: NonDetMultiThreadedAugmenter, count: int, batch_size: int) -> float:
    """Patches per second, once what the workers had made ahead is gone."""
    for _ in range(2 * batches.num_cached):
        next(batches)
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * batch_size / (time.perf_counter() - started)
