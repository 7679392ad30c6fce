"""The first losses of every recipe, compared with those that were recorded: a change of them must be a decision."""

import pandas as pd
import pytest
import torch
from golden import recorded

from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.loop import pretrain
from nnunet_ssl.pretraining.recipes import recipes
from nnunet_ssl.pretraining.run.records import Records

SMALL = [
    "swin.embed_dim=8",
    "swin.depths=2,1",  # the second block's windows are shifted
    "swin.num_heads=1,2",
    "swin.window_size=3",
    "resenc.features=4,8,12,16",
    "resenc.blocks=1,1,1,1",
    "patch_size=16,24,16",
    "batch_size=2",
    "masked.unpaired_batch_size=1",
    "masked.width=8",
    "masked.tokens={level: 1, prototypes: 16, hidden: 16, bottleneck: 8}",
    "contrastive.hidden=256",
    "contrastive.dim=16",
    "queue_size=24",
]
"""Networks with every part of the large ones, so small that a step takes a twentieth of a second.

But the projection head is wide: of few hidden units, one that turns from just above zero to just below shows.
"""

EVERYTHING_SHOWS = [
    "steps=30",
    "learning_rate=1e-3",
    "minimum_learning_rate=2e-4",
    "warmup=0.2",
    "weight_decay=5.0",
    "gradient_clip=0.5",
    "momentum={low: 0.5, high: 0.9, begin: 0.2, until: 0.8}",
    "contrastive.weight={low: 0.1, high: 1.0, begin: 0.2, until: 0.6}",
    "masked.tokens.teacher_temperature={low: 0.04, high: 0.07, until: 0.5}",
    "augmentation.contrast_probability=1",
    "augmentation.contrast=0.5",
    "augmentation.noise_probability=1",
    "augmentation.noise_std=0.5",
    "augmentation.smooth_sigma=[1, 2]",
    "augmentation.bias_field=[0, 0.3]",
    "augmentation.gamma=[0.5, 1.5]",
    "augmentation.low_resolution=[0.4, 0.7]",
]
"""Schedules that move within 30 steps and strong augmentation: what is wrong in either changes losses visibly."""

EVERY_STEP = [
    "log_every=1",
    "gradients_every=10",
    "workers=0",
    "validation={fraction: 0.3, every: 30, batches: 0, sessions: 1}",
]

RUNS = {name: (name, []) for name in recipes()} | {
    "mcl_mim, shared pass": ("mcl_mim", ["shared_pass=true"]),
    "mcl_mim, in two parts": ("mcl_mim", ["accumulation=2", "masked.unpaired_batch_size=2"]),
    "mcl_mim, resenc": ("mcl_mim", ["backbone=resenc"]),
}


@pytest.mark.parametrize("run", RUNS)
def test_losses_of_pretraining(run, golden, write_prepared, nnunet_folders, monkeypatch):
    monkeypatch.setattr(Records, "plot", lambda records: None)
    monkeypatch.setattr(Records, "picture", lambda *_: None)
    write_prepared()
    recipe, overrides = RUNS[run]
    config = load_config(recipe, [*SMALL, *EVERYTHING_SHOWS, *EVERY_STEP, "recipe=run", *overrides])
    pretrain(config, 500, False, torch.device("cpu"))
    table = pd.read_csv(nnunet_folders["nnUNet_results"] / "Dataset500_FOMO60K" / "run" / "progress.csv")
    losses = table.loc[table["step"] > 0, [name for name in table if name.startswith("loss/")]]
    golden(f"pretraining: {run}", losses.to_dict("list"))


def test_every_recorded_run_is_still_run():
    assert {name for name in recorded() if name.startswith("pretraining")} == {f"pretraining: {run}" for run in RUNS}
