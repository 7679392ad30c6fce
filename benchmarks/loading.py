"""Patches per second and core: our reading, and our reading and augmentation, against nnssl's way and the reference's.

On one synthetic store of volumes of real size, in one process, on one thread, in turn, several rounds:

    read                nnunet_ssl: boxes of co-located pairs, as a worker of the loader reads them
    read + augment      nnunet_ssl: and everything that is done to them afterwards, here on the CPU
    nnssl: read         nnU-Net's data set class and the margin of the worst case, image only
    nnssl: read + warp  and batchgeneratorsv2's SpatialTransform
    MONAI               whole volumes and dictionary transforms, as the paper's code has them, then the crop

Seconds are seconds of the processor, with the files in the page cache: what a core takes that does nothing else.

    python benchmarks/loading.py --rounds 7
    python benchmarks/loading.py --long-life 10000 --workers 2     # memory and open files over so many batches
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import blosc2
import numpy as np
import pandas as pd
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from monai.transforms import (
    Compose,
    CopyItemsd,
    OneOf,
    RandAdjustContrastd,
    RandAffined,
    RandBiasFieldd,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandGibbsNoised,
    RandScaleIntensityFixedMeand,
    RandSimulateLowResolutiond,
    RandSpatialCropd,
    SpatialPadd,
)
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from scipy.ndimage import zoom

from nnunet_ssl.corpus.prepared import Corpus, number_rows
from nnunet_ssl.corpus.store import to_half, write_case
from nnunet_ssl.pretraining.views.augmentation import AugmentationConfig, augment
from nnunet_ssl.pretraining.views.loading import make_loader
from nnunet_ssl.pretraining.views.sampling import SamplingConfig

SHAPE = (160, 200, 170)
PATCH = (96, 96, 96)
ROTATION, SCALE, SHEAR = 0.3, 0.1, 0.3
PAIRS_PER_BATCH = 4
COMPARISONS = [
    ("read", "MONAI", 50),
    ("read + augment", "MONAI", 10),
    ("read", "nnssl: read + warp", 4),
    ("read", "nnssl: read", None),
    ("read + augment", "nnssl: read + warp", None),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sessions", type=int, default=3, help="of two volumes each")
    parser.add_argument("--long-life", type=int, metavar="BATCHES", help="watch memory and open files instead")
    parser.add_argument("--workers", type=int, default=2, help="for --long-life")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_store(Path(folder), arguments.sessions)
        if arguments.long_life:
            live_long(corpus, arguments.long_life, arguments.workers)
        else:
            compare(corpus, arguments.rounds)


def write_store(folder: Path, sessions: int) -> Corpus:
    """Write ellipsoids of smooth noise as nnssl_prepare writes brains."""
    middle = (np.array(SHAPE) - 1) / 2
    inside = sum(((n - m) / s) ** 2 for n, m, s in zip(np.ogrid[tuple(map(slice, SHAPE))], middle, middle)) < 1
    foreground = np.where(inside, 0, -1).astype(np.int8)[None]
    rows = []
    for session, modality in itertools.product(range(sessions), ("t1", "flair")):
        rng = np.random.default_rng([session, len(modality)])
        coarse = zoom(rng.normal(size=[size // 8 + 1 for size in SHAPE]), 8, order=1)
        image = coarse[tuple(map(slice, SHAPE))] + rng.normal(0, 0.1, SHAPE)
        scan = f"A__sub_{session}__ses_1__{modality}"
        row = {
            "scan_id": scan,
            "dataset": "A",
            "subject": f"A/sub_{session}",
            "session": f"A/sub_{session}/ses_1",
            "modality": modality,
            "repeat": 1,
            "shape": ",".join(map(str, SHAPE)),
            "bbox": ",".join(f"0,{size}" for size in SHAPE),
        }
        image = to_half(np.where(inside, image, 0)[None])
        write_case(folder / scan, image, foreground, {}, patch_size=PATCH, fingerprint="", row=row)
        rows.append(row)
    return Corpus(folder, number_rows(pd.DataFrame(rows)), {"spacing": [1.0, 1.0, 1.0]})


# --- the ways: each yields, again and again, the number of patches it has just made


def ours(corpus: Corpus, *, augmented: bool) -> Iterator[int]:
    loader = make_loader(
        corpus,
        kind="mcl",
        batch_size=PAIRS_PER_BATCH,
        patch_size=PATCH,
        sampling=SamplingConfig(),
        augmentation=AugmentationConfig(rotation=ROTATION, scale=SCALE, shear=SHEAR),
        seed=0,
    )
    for raw in loader:
        if augmented:
            augment(raw, "cpu")
        yield len(raw.sizes)


def nnssl(corpus: Corpus, *, warped: bool) -> Iterator[int]:
    """One patch of one scan: the crop is large enough for any rotation and scale, as nnU-Net's loader has it."""
    dataset = nnUNetDatasetBlosc2(str(corpus.folder), corpus.scans["scan_id"].tolist())
    angles = (-ROTATION, ROTATION)
    margin = get_patch_size(PATCH, angles, angles, angles, (1 - SCALE, 1 + SCALE))
    transform = SpatialTransform(
        PATCH,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_rotation=1,
        rotation=angles,
        p_scaling=1,
        scaling=(1 - SCALE, 1 + SCALE),
        p_synchronize_scaling_across_axes=0,
        bg_style_seg_sampling=False,
    )
    rng = np.random.default_rng(0)
    while True:
        image, *_ = dataset.load_case(rng.choice(dataset.identifiers))
        centre = [rng.integers(48, size - 47) for size in SHAPE]
        box = [[int(c - m // 2), int(c - m // 2 + m)] for c, m in zip(centre, margin)]
        crop = torch.from_numpy(crop_and_pad_nd(image, box, 0)).float()
        if warped:
            transform(image=crop)
        yield 1


def monai(corpus: Corpus) -> Iterator[int]:
    """Two patches of a session: two whole volumes are decompressed, warped and degraded, then cropped alike."""
    keys = ["one", "two"]
    steps = [RandFlipd(keys, spatial_axis=Corpus.left_right_axis, prob=0.5)]
    for key in keys:
        steps += [
            RandAffined(
                key,
                prob=1,
                rotate_range=[ROTATION] * 3,
                scale_range=[SCALE] * 3,
                shear_range=[SHEAR] * 3,
                padding_mode="border",
            ),
            CopyItemsd(key, names=f"{key}_target"),
            RandScaleIntensityFixedMeand(key, prob=0.8, factors=0.1),
            RandGaussianNoised(key, prob=0.3, std=0.01),
            OneOf(
                [
                    RandGaussianSmoothd(key, prob=0.7, sigma_x=(0.5, 1), sigma_y=(0.5, 1), sigma_z=(0.5, 1)),
                    RandBiasFieldd(key, prob=0.7, coeff_range=(0, 0.05)),
                    RandGibbsNoised(key, prob=0.7, alpha=(0.2, 0.4)),
                ]
            ),
            OneOf(
                [
                    RandAdjustContrastd(key, prob=1, gamma=(0.9, 1.1)),
                    RandSimulateLowResolutiond(key, prob=0.5, zoom_range=(0.8, 1)),
                ]
            ),
        ]
    every = [*keys, *(f"{key}_target" for key in keys)]
    transform = Compose([*steps, SpatialPadd(every, PATCH, mode="edge"), RandSpatialCropd(every, PATCH)])
    transform.set_random_state(0)
    rng = np.random.default_rng(0)
    while True:
        session = 2 * rng.integers(len(corpus) // 2)
        paths = [corpus.path(session + n) for n in range(2)]
        volumes = [torch.from_numpy(blosc2.open(str(path), dparams={"nthreads": 1})[:]).float() for path in paths]
        transform(dict(zip(keys, volumes)))
        yield 2


def compare(corpus: Corpus, rounds: int) -> None:
    """Print a table of rates, and of ratios within each round."""
    ways: dict[str, Iterator[int]] = {
        "read": ours(corpus, augmented=False),
        "read + augment": ours(corpus, augmented=True),
        "nnssl: read": nnssl(corpus, warped=False),
        "nnssl: read + warp": nnssl(corpus, warped=True),
        "MONAI": monai(corpus),
    }
    for way in ways.values():
        next(way)  # libraries load, caches fill
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            rates[name].append(rate(way, patches=8 if name == "MONAI" else 32))
    mb = sum(corpus.path(row).stat().st_size for row in range(len(corpus))) / len(corpus) / 1e6
    print(f"{len(corpus)} volumes of {SHAPE} ({mb:.1f} MB each), patches of {PATCH}, {rounds} rounds, one thread")
    for name, values in rates.items():
        print(f"{name:20s} {spread(values)} patches per second and core")
    for one, other, target in COMPARISONS:
        ratios = [a / b for a, b in zip(rates[one], rates[other])]
        print(f"{one} / {other}: {spread(ratios)}" + (f", target {target}" if target else ""))


def rate(way: Iterator[int], patches: int) -> float:
    """Patches per second of the processor."""
    start, made = time.process_time(), 0
    while made < patches:
        made += next(way)
    return made / (time.process_time() - start)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} [{min(values):.1f}-{max(values):.1f}]"


# --- a long life


def live_long(corpus: Corpus, batches: int, workers: int) -> None:
    """Read and augment; print resident memory and open files of this process and its workers ten times on the way."""
    loader = make_loader(
        corpus,
        kind="mcl",
        batch_size=1,
        patch_size=(32, 32, 32),
        sampling=SamplingConfig(),
        augmentation=AugmentationConfig(),
        seed=0,
        workers=workers,
    )
    started = time.perf_counter()
    for number, raw in enumerate(itertools.islice(loader, batches), start=1):
        augment(raw, "cpu")
        if number % max(1, batches // 10) == 0:
            pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            files = [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids]
            resident = [resident_mib(pid) for pid in pids]
            seconds = time.perf_counter() - started
            print(
                f"{number:8d} batches {seconds:7.0f} s   resident MiB: {resident[0]:.0f} + "
                f"{sum(resident[1:]):.0f} in workers   open files: {files[0]} + {sum(files[1:])}",
                flush=True,
            )


def resident_mib(pid: int) -> float:
    """Memory in RAM; what workers share with their parent counts for each."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
