"""The settings of fine-tuning, read from one environment variable and written into the plans and their name."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nnunet_ssl.architectures.swin import MERGINGS
from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.recipes import OPTIMIZERS, RECIPES, SCHEDULES, with_brought

VARIABLE = "nnssl_settings"
CHOICES = {
    "recipe": tuple(RECIPES),
    "schedule": tuple(SCHEDULES),
    "decay": ("cosine", "poly"),
    "optimizer": tuple(OPTIMIZERS),
    "loss": ("dice_ce", "dice_topk"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a fine-tuning goes; the defaults are the recipe of arXiv 2511.11311.

    Attributes:
        recipe: a word for what the settings were before single ones were named, see `recipes.RECIPES`.
        steps: optimizer steps in all.
        epoch_steps: optimizer steps in one of nnU-Net's epochs; validation, logging and checkpoints follow each.
        schedule: ``paper``: the decoder's rate follows one curve over all steps, the encoder's begins when it is
            unfrozen; ``warmup``: both learn from the first step; ``sawtooth``: the decoder alone, then both, each
            time with a rise and a fall.
        freeze_share: share of the steps, from the start, in which a pre-trained encoder stays as it is.
        warmup_share: share of the steps over which learning rates rise.
        decay: how they fall: ``cosine``, or nnU-Net's ``poly``.
        optimizer: ``adamw``, or ``sgd`` as nnU-Net has it.
        lr: peak learning rate of decoder and head.
        encoder_lr: peak learning rate of the encoder. ``None``: a tenth of `lr` for a pre-trained encoder in the
            paper's schedule, `lr` itself in the others and for an encoder that starts from scratch.
        loss: ``dice_ce``: nnU-Net's default (Dice + BCE for regions); ``dice_topk``: the cross-entropy of the hardest
            tenth of the voxels in place of all.
        average_share: the final weights are the mean of those after each epoch in the last share of the steps; 0: the
            last.
        patch_size: patch in voxels, in the plans' axis order. ``None``: the plans'.
        batch_size: patches per step. ``None``: the plans'.
        fraction: per cent of the fold's training subjects to train on; smaller fractions are subsets of larger ones.
        merging: of a Swin checkpoint whose file does not tell it, a key of :data:`architectures.swin.MERGINGS`.
        seed: draws the order of subjects for `fraction`, and the initial weights of what is not pre-trained.
        name: keeps apart what no other setting does, such as models that start from different checkpoints.
    """

    recipe: str = "paper"
    steps: int = 5000
    epoch_steps: int = 250
    schedule: str = "paper"
    freeze_share: float = 0.3
    warmup_share: float = 0.05
    decay: str = "cosine"
    optimizer: str = "adamw"
    lr: float = 5e-4
    encoder_lr: float | None = None
    loss: str = "dice_ce"
    average_share: float = 0.0
    patch_size: tuple[int, int, int] | None = None
    batch_size: int | None = None
    fraction: int = 100
    merging: str | None = None
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        _require_known(dataclasses.asdict(self))
        _require(self.steps >= 1 and self.epoch_steps >= 1, "steps and epoch_steps must be at least 1")
        _require(
            self.steps % min(self.epoch_steps, self.steps) == 0,
            f"steps={self.steps} is not a whole number of epochs of epoch_steps={self.epoch_steps}",
        )
        _require(0 <= self.freeze_share < 1, f"freeze_share={self.freeze_share} must be at least 0 and below 1")
        _require(0 <= self.warmup_share < 1, f"warmup_share={self.warmup_share} must be at least 0 and below 1")
        _require(0 <= self.average_share < 1, f"average_share={self.average_share} must be at least 0 and below 1")
        self._check_schedule()
        _require(
            0 < self.lr < 1 and (self.encoder_lr is None or 0 < self.encoder_lr < 1),
            "lr and encoder_lr must lie between 0 and 1",
        )
        _require(1 <= self.fraction <= 100, f"fraction={self.fraction} must be 1 to 100 (per cent)")
        _require(self.batch_size is None or self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1")
        _require(
            self.patch_size is None or (len(self.patch_size) == 3 and min(self.patch_size) >= 1),
            f"patch_size={self.patch_size} must be three positive numbers, such as 96x96x96",
        )
        _require(
            self.merging is None or self.merging in MERGINGS,
            f"merging={self.merging} must be one of {', '.join(MERGINGS)}",
        )
        _require(self.seed >= 0, f"seed={self.seed} must not be negative")
        _require(re.fullmatch("[A-Za-z0-9]*", self.name) is not None, f"name={self.name} may hold letters and digits")

    def _check_schedule(self) -> None:
        """Refuse settings that contradict each other."""
        _require(
            self.schedule != "warmup" or self.freeze_share == 0,
            f"schedule=warmup trains all from the first step, so freeze_share={self.freeze_share} contradicts it; "
            "schedule=sawtooth trains the decoder first",
        )
        _require(
            self.schedule != "sawtooth" or round(self.freeze_share * self.steps) > 0,
            f"schedule=sawtooth trains the decoder first, and freeze_share={self.freeze_share} of steps={self.steps} "
            "is no step; schedule=warmup trains all from the first step",
        )
        rising = self.freeze_share + self.warmup_share
        _require(
            self.schedule == "paper" or rising < 1,
            f"freeze_share={self.freeze_share} and warmup_share={self.warmup_share} take all steps, and schedule="
            f"{self.schedule} would never decay",
        )
        _require(
            self.average_share == 0 or rising + self.average_share <= 1 + 1e-9,
            f"average_share={self.average_share} reaches back into the {rising:g} of the steps that freeze_share="
            f"{self.freeze_share} and warmup_share={self.warmup_share} take",
        )

    @property
    def epochs(self) -> int:
        return self.steps // min(self.epoch_steps, self.steps)

    @property
    def averaged_epochs(self) -> int:
        """How many of the last epochs count for the final weights; 0: the weights are those of the last step."""
        return max(1, round(self.average_share * self.epochs)) if self.average_share else 0

    @classmethod
    def of_plans(cls, plans: Mapping[str, Any]) -> Settings:
        """Return the settings that :func:`plans.plans_with_settings` has written into `plans`, else the defaults."""
        written = dict(plans.get("nnunet_ssl", {}).get("settings", {}))
        if written.get("patch_size") is not None:
            written["patch_size"] = tuple(written["patch_size"])
        return cls(**written)

    def updated(self, text: str) -> Settings:
        """Return these settings with those of `text`, such as ``"steps=500,patch_size=64x64x64"``, in their place.

        A recipe, a schedule or an optimizer that these settings do not have yet brings the settings that belong to it,
        see `recipes`. What `text` names singly counts, wherever in `text` it stands.

        Raises:
            UserError: an unknown key, a value of the wrong kind or out of range, or values that contradict each other.
        """
        readers = {field.name: _READERS[str(field.type)] for field in dataclasses.fields(self)}
        values: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            key, _, value = (part.strip() for part in item.partition("="))
            if key not in readers:
                near = difflib.get_close_matches(key, readers, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(readers)}."
                raise UserError(f"{VARIABLE} has no key '{key}': {hint}")
            try:
                values[key] = readers[key](value)
            except ValueError:
                raise UserError(f"{VARIABLE}: '{value}' is not a value for {key}.") from None
        _require_known(values)
        return Settings(**with_brought(dataclasses.asdict(self), values))

    def updated_from_environment(self) -> Settings:
        """Return these settings with those of the environment variable ``nnssl_settings`` in their place."""
        return self.updated(os.environ.get(VARIABLE, ""))

    def suffix(self) -> str:
        """Return what to add to the plans' name so that runs with different settings never share a folder.

        Only settings that differ from those of the recipe appear, the paper's being silent: ``""``,
        ``"_steps500_patch64x64x64"``, or ``"_recipe-long_steps500"``.
        """
        of_recipe = with_brought(dataclasses.asdict(Settings()), {"recipe": self.recipe})
        words = {key: getattr(self, key) for key in ("schedule", "optimizer")}
        base = with_brought(of_recipe, words) | {"recipe": "paper"} | {key: of_recipe[key] for key in words}
        return "".join(
            f"_{_SHORT.get(key, key)}{_written(value)}"
            for key, value in dataclasses.asdict(self).items()
            if value != base[key]
        )


_READERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "str | None": str,
    "int": int,
    "int | None": int,
    "float": float,
    "float | None": float,
    "tuple[int, int, int] | None": lambda text: tuple(int(size) for size in text.split("x")),
}
_SHORT = {
    "recipe": "recipe-",
    "epoch_steps": "epoch",
    "schedule": "schedule-",
    "freeze_share": "freeze",
    "warmup_share": "warmup",
    "decay": "decay-",
    "optimizer": "optimizer-",
    "encoder_lr": "encoderlr",
    "loss": "loss-",
    "average_share": "average",
    "patch_size": "patch",
    "batch_size": "batch",
    "merging": "merging-",
    "name": "name-",
}


def _written(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _require_known(values: Mapping[str, Any]) -> None:
    for key in CHOICES.keys() & values.keys():
        _require(values[key] in CHOICES[key], f"{key}={values[key]} is none of {', '.join(CHOICES[key])}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"{VARIABLE}: {message}.")
