"""Do the methods do what they should? Every recipe trained briefly on synthetic brains, and the table of what came out.

Expected: mcl brings the modalities of a subject together (cross-modality distance well below cl's) while subjects stay
apart (cross-subject distance); masked modelling beats predicting the mean of what is hidden (a relative error below 1).

    python benchmarks/recipes.py                        under half an hour on two CPU cores that do nothing else
    python benchmarks/recipes.py --recipes mcl cl --steps 50
    python benchmarks/recipes.py --backbone resenc      the same on a small version of nnU-Net's residual encoder
    python benchmarks/recipes.py -device cuda --steps 5000 --voxel_mm 1 --set swin.embed_dim=48 patch_size=96 \\
        swin.depths=2,2,6,2 swin.num_heads=3,6,12,24 swin.window_size=7 batch_size=16 queue_size=4096

The corpus and the finished runs stay in the folder of -w; a repeated call trains only what is missing. The last line of
the table is the shared pass: one masked pass of the query network for both branches. Every line is one run with
one seed.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pandas as pd
from tables import markdown

from nnunet_ssl.corpus.indexing import index_corpus
from nnunet_ssl.corpus.prepare import PreparationConfig, prepare_corpus
from nnunet_ssl.nnunet_folders import folder_of
from nnunet_ssl.phantom.layouts import write_fomo
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.distributed import launch
from nnunet_ssl.pretraining.loop import pretrain

CORPUS = "Dataset500_FOMO60K"

RUNS = {
    "cl": ("cl",),
    "mcl": ("mcl",),
    "mim": ("mim",),
    "cl_mim": ("cl_mim",),
    "mcl_mim": ("mcl_mim",),
    "mcl_mim_balanced": ("mcl_mim_balanced",),
    "mcl_ibot": ("mcl_ibot", "masked.tokens.level=1", "masked.tokens.prototypes=256", "masked.tokens.hidden=128"),
    "mcl_path": ("mcl_path",),
    "mcl_dense": ("mcl_dense",),
    "mcl_mim_shared": ("mcl_mim", "shared_pass=true"),
}

SMALL = [
    "swin.embed_dim=16",
    "swin.depths=1,1",
    "swin.num_heads=2,4",
    "swin.window_size=4",
    "resenc.features=8,16,32,64",
    "resenc.blocks=1,1,2,2",
    "patch_size=32",
    "batch_size=8",
    "masked.unpaired_batch_size=2",
    "contrastive.hidden=128",
    "contrastive.dim=64",
    "queue_size=256",
    "momentum={low: 0.95, high: 0.99, begin: 0.05, until: 0.2}",
    "learning_rate=1e-3",
    "workers=1",
    "validation.fraction=0.2",
]
"""Patches of 32^3, which at 3 mm show as much of the head as the paper's 96^3 at 1 mm; both encoders end with a map of
64 channels at stride 8. The key network follows faster: with the paper's 0.996 it would still be half the untrained
one after 170 steps."""

COLUMNS = {
    "cross-modality": "validation/cross_modality_distance",
    "cross-subject": "validation/cross_subject_distance",
    "their ratio": "ratio",
    "effective rank": "validation/effective_rank",
    "InfoNCE loss": "validation/loss/contrastive",
    "error / mean's": "validation/masked/error_over_mean",
    "gradient ratio": "gradient_ratio",
    "gradient cosine": "gradient/cosine",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-w", type=Path, default=Path("demo_work/recipes"), help="folder to work in")
    parser.add_argument("--backbone", choices=["swin", "resenc"], default="swin")
    parser.add_argument("--recipes", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--subjects", type=int, default=40)
    parser.add_argument("--voxel_mm", type=float, default=3.0)
    parser.add_argument("-device", default="cpu")
    parser.add_argument("--set", dest="settings", nargs="+", default=[], metavar="KEY=VALUE", help="for all recipes")
    arguments = parser.parse_args()

    lay_out(arguments.w.resolve(), arguments.subjects, arguments.voxel_mm)
    every = [f"steps={arguments.steps}", f"validation.every={arguments.steps}", "log_every=20", "gradients_every=20"]
    every += [f"backbone={arguments.backbone}"]
    rows = []
    for name in arguments.recipes:
        recipe, *overrides = RUNS[name]
        run = name if arguments.backbone == "swin" else f"{name}_{arguments.backbone}"
        config = load_config(recipe, [*SMALL, *every, f"recipe={run}", *overrides, *arguments.settings])
        folder = folder_of("nnUNet_results") / CORPUS / run
        if not (folder / "encoder.safetensors").is_file():
            launch(pretrain, (config, CORPUS, True), processes=1, device=arguments.device)
        if not (folder / "encoder.safetensors").is_file():
            raise SystemExit("Asked to stop: the same command goes on.")
        table = pd.read_csv(folder / "progress.csv")
        if not rows:
            embeddings = [name for name in table if name in list(COLUMNS.values())[:4]]
            rows.append({"recipe": "(untrained)", **outcome(table[embeddings].head(1))})
        rows.append({"recipe": name, **outcome(table[table["step"] > config.steps / 2])})
        print(markdown(pd.DataFrame(rows), 3), flush=True)


def lay_out(work: Path, subjects: int, voxel_mm: float) -> None:
    """Write synthetic brains, index and prepare them, unless they are there."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (work / variable).mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(work / variable)
    if not (work / "fomo").is_dir():
        write_fomo(work / "fomo", n_subjects=subjects, layout="B", voxel_mm=voxel_mm, seed=0, quirks=True)
    index_corpus(work / "fomo", 500, "FOMO60K")
    prepare_corpus(500, PreparationConfig(spacing=(voxel_mm,) * 3), processes=1, scheduler=None, device="cpu")


def outcome(rows: pd.DataFrame) -> dict[str, float]:
    """The figures of the last row where they are measured at times, else the medians of all."""
    last = rows.iloc[-1]
    known = {name: last[name] if name.startswith("validation/") else rows[name].median() for name in rows.columns}
    if {"gradient/contrastive", "gradient/masked"} <= known.keys():
        known["gradient_ratio"] = (rows["gradient/contrastive"] / rows["gradient/masked"]).median()
    known["ratio"] = known["validation/cross_modality_distance"] / known["validation/cross_subject_distance"]
    return {title: known[name] for title, name in COLUMNS.items() if name in known}


if __name__ == "__main__":
    main()
