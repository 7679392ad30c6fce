"""Scans per second and bytes per scan of nnssl_prepare against stock nnUNetv2_preprocess, on the same synthetic scans.

Both commands run as their users run them, on one process, in turn, several times; the fingerprint and the planning of
stock nnU-Net are not counted: it gets ready plans with the same spacing and the same resampling of images.

    python benchmarks/preparation.py --subjects 4 --voxel-mm 1 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np

from nnunet_ssl.corpus.indexing import index_corpus
from nnunet_ssl.corpus.plans import PreparationConfig, make_plans
from nnunet_ssl.corpus.prepared import DATA_IDENTIFIER
from nnunet_ssl.phantom.layouts import write_fomo

OURS, STOCK = "Dataset500_FOMO60K", "Dataset900_Stock"
COMMANDS = {
    "nnssl_prepare": [sys.executable, "-c", "from nnunet_ssl.corpus.cli import prepare; prepare()", "-d", "500"],
    "nnUNetv2_preprocess": [
        *(sys.executable, "-c"),
        "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import preprocess_entry; preprocess_entry()",
        *("-d", "900", "-plans_name", "nnUNetPlans", "-c", "3d_fullres", "-np", "1"),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=4)
    parser.add_argument("--voxel-mm", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        scans = lay_out(Path(work), arguments.subjects, arguments.voxel_mm)
        seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
        for _ in range(arguments.repeats):
            for name in COMMANDS:
                seconds[name].append(run(name, Path(work)))
        report(Path(work), scans, seconds)


def lay_out(work: Path, subjects: int, voxel_mm: float) -> int:
    """Write the scans, index them, and describe the same files to stock nnU-Net, with empty labels; count them."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (work / variable).mkdir()
        os.environ[variable] = str(work / variable)
    write_fomo(work / "fomo", n_subjects=subjects, layout="B", voxel_mm=voxel_mm, seed=0, quirks=False)
    _, scans = index_corpus(work / "fomo", 500, "FOMO60K")
    dataset = {}
    for scan in scans.itertuples():
        image = nibabel.load(scan.path)
        label = work / "labels" / f"{scan.scan_id}.nii.gz"
        label.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), label)
        dataset[scan.scan_id] = {"images": [scan.path], "label": str(label)}
    description = json.loads((work / "nnUNet_raw" / OURS / "dataset.json").read_text())
    description |= {"labels": {"background": 0, "lesion": 1}, "dataset": dataset}
    plans = make_plans(STOCK, PreparationConfig())
    plans["plans_name"] = "nnUNetPlans"
    plans["configurations"]["3d_fullres"] |= {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "normalization_schemes": ["ZScoreNormalization"],
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
    }
    for folder in (work / "nnUNet_raw" / STOCK, work / "nnUNet_preprocessed" / STOCK):
        folder.mkdir()
        (folder / "dataset.json").write_text(json.dumps(description))
    (work / "nnUNet_preprocessed" / STOCK / "nnUNetPlans.json").write_text(json.dumps(plans))
    return len(scans)


def run(name: str, work: Path) -> float:
    """Run a command on one thread from nothing (stock nnU-Net clears its folder itself); return its seconds."""
    if name == "nnssl_prepare":
        shutil.rmtree(work / "nnUNet_preprocessed" / OURS, ignore_errors=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    start = time.perf_counter()
    subprocess.run(COMMANDS[name], env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def report(work: Path, scans: int, seconds: dict[str, list[float]]) -> None:
    """Print a table; bytes are those of images, masks and properties together, as each command left them."""
    print(f"{scans} scans, one process, {len(seconds['nnssl_prepare'])} interleaved runs, start-up included")
    stores = {"nnssl_prepare": DATA_IDENTIFIER, "nnUNetv2_preprocess": "nnUNetPlans_3d_fullres"}
    for name, folder, dataset in zip(stores, stores.values(), (OURS, STOCK)):
        size = sum(path.stat().st_size for path in (work / "nnUNet_preprocessed" / dataset / folder).iterdir())
        rates = sorted(scans / one for one in seconds[name])
        print(
            f"{name:20s} {statistics.median(rates):.3f} scans/s [{rates[0]:.3f}-{rates[-1]:.3f}]"
            f"   {size / scans / 1e6:.2f} MB/scan"
        )


if __name__ == "__main__":
    main()
