"""Recipes of fine-tuning by one word: which settings a word stands for, and where its numbers come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

RecipeName = Literal["paper", "long", "primus", "quick"]
ScheduleName = Literal["paper", "warmup", "sawtooth"]
OptimizerName = Literal["adamw", "sgd", "adamw_primus"]

SCHEDULES: dict[ScheduleName, dict[str, Any]] = {
    "paper": {"freeze_share": 0.3, "decay": "cosine"},
    "warmup": {"freeze_share": 0.0, "decay": "poly"},
    "sawtooth": {"freeze_share": 0.05, "decay": "poly"},
}
"""What a schedule brings: arXiv 2511.11311; ``PretrainedTrainer`` of MIC-DKFZ/nnUNet; ``PretrainedTrainer_sawtooth`` of
TaWald/nnUNet, whose decoder learns alone for 50 of 1,000 epochs."""

OPTIMIZERS: dict[OptimizerName, dict[str, Any]] = {
    "adamw": {"lr": 5e-4},
    "sgd": {"lr": 1e-3},
    "adamw_primus": {"lr": 1e-4},
}
"""What an optimizer brings: arXiv 2511.11311; ``PretrainedTrainer`` and ``PretrainedTrainer_Primus`` of
MIC-DKFZ/nnUNet."""

RECIPES: dict[RecipeName, dict[str, Any]] = {
    "paper": {
        "steps": 5000,
        "schedule": "paper",
        **SCHEDULES["paper"],
        "optimizer": "adamw",
        "lr": 5e-4,
        "loss": "dice_ce",
        "average_share": 0.0,
    },
    "long": {
        "steps": 250_000,
        "schedule": "warmup",
        **SCHEDULES["warmup"],
        "optimizer": "adamw",
        "lr": 1e-4,
        "loss": "dice_topk",
        "average_share": 0.1,
    },
    "primus": {
        "steps": 250_000,
        "schedule": "warmup",
        **SCHEDULES["warmup"],
        "optimizer": "adamw_primus",
        "lr": 1e-4,
        "loss": "dice_ce",
        "average_share": 0.0,
    },
    "quick": {
        "steps": 1000,
        "schedule": "warmup",
        **SCHEDULES["warmup"],
        "optimizer": "adamw",
        "lr": 5e-4,
        "loss": "dice_ce",
        "average_share": 0.0,
    },
}
"""What a recipe brings.

``paper``: arXiv 2511.11311. ``long``: as many steps as nnU-Net's own training, and nothing frozen; the whole network
rises over 50 of 1,000 epochs and falls as nnU-Net does, at the rate of MIC-DKFZ's ``PretrainedTrainer_Primus`` (AdamW,
1e-4); late weights are averaged, which made KawhiQaQ/ISLES26-StrokeFusion better; Dice + TopK is what made the Swin
network better in the study ``recipes``, and was no worse in a public comparison. ``primus``: that trainer altogether,
with its optimizer and its clipping. ``quick``: a first look.
"""


def with_brought(values: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with those of `named` in their place, and with what a newly named word brings along.

    Args:
        values: all settings.
        named: some of them. A recipe, schedule or optimizer that `values` have already brings nothing; a recipe brings
            less than a schedule, and both less than what `named` says singly.
    """
    values = dict(values)
    for word, brings in (("recipe", RECIPES), ("schedule", SCHEDULES), ("optimizer", OPTIMIZERS)):
        if (chosen := named.get(word, values[word])) != values[word]:
            values |= brings[chosen]
    return values | dict(named)
