"""The few knobs of fine-tuning, read from one environment variable and written into the plans and their name."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnunet_ssl.architectures.swin import MERGINGS
from nnunet_ssl.errors import UserError

VARIABLE = "nnssl_settings"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Length and pace of a fine-tuning; the defaults are the recipe of arXiv 2511.11311.

    Attributes:
        steps: optimizer steps in all.
        epoch_steps: optimizer steps in one of nnU-Net's epochs; validation, logging and checkpoints follow each.
        freeze_share: share of the steps, from the start, in which a pre-trained encoder stays as it is.
        lr: peak learning rate of decoder and head.
        encoder_lr: peak learning rate of the encoder. ``None``: a tenth of `lr` for a pre-trained encoder, `lr` itself
            for one that starts from scratch.
        patch_size: patch in voxels, in the plans' axis order. ``None``: the plans'.
        batch_size: patches per step. ``None``: the plans'.
        fraction: per cent of the fold's training subjects to train on; smaller fractions are subsets of larger ones.
        merging: of a Swin checkpoint whose file does not tell it, a key of :data:`architectures.swin.MERGINGS`.
        seed: draws the order of subjects for `fraction`, and the initial weights of what is not pre-trained.
        name: keeps apart what no other setting does, such as models that start from different checkpoints.
    """

    steps: int = 5000
    epoch_steps: int = 250
    freeze_share: float = 0.3
    lr: float = 5e-4
    encoder_lr: float | None = None
    patch_size: tuple[int, int, int] | None = None
    batch_size: int | None = None
    fraction: int = 100
    merging: str | None = None
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        _require(self.steps >= 1 and self.epoch_steps >= 1, "steps and epoch_steps must be at least 1")
        _require(
            self.steps % min(self.epoch_steps, self.steps) == 0,
            f"steps={self.steps} is not a whole number of epochs of epoch_steps={self.epoch_steps}",
        )
        _require(0 <= self.freeze_share < 1, f"freeze_share={self.freeze_share} must be at least 0 and below 1")
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

    @classmethod
    def of_plans(cls, plans: Mapping[str, Any]) -> Settings:
        """Return the settings that :func:`plans.plans_with_settings` has written into `plans`, else the defaults."""
        written = dict(plans.get("nnunet_ssl", {}).get("settings", {}))
        if written.get("patch_size") is not None:
            written["patch_size"] = tuple(written["patch_size"])
        return cls(**written)

    def updated(self, text: str) -> Settings:
        """Return these settings with those of `text`, such as ``"steps=500,patch_size=64x64x64"``, in their place.

        Raises:
            UserError: an unknown key, a value of the wrong kind or out of range.
        """
        readers = {field.name: _READERS[field.type] for field in dataclasses.fields(self)}
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
        return dataclasses.replace(self, **values)

    def updated_from_environment(self) -> Settings:
        """Return these settings with those of the environment variable ``nnssl_settings`` in their place."""
        return self.updated(os.environ.get(VARIABLE, ""))

    def suffix(self) -> str:
        """Return what to add to the plans' name so that runs with different settings never share a folder.

        Only settings that differ from the defaults appear: ``""``, or ``"_steps500_patch64x64x64"``.
        """
        return "".join(
            f"_{_SHORT.get(field.name, field.name)}{_written(value)}"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        )


_READERS = {
    "str": str,
    "str | None": str,
    "int": int,
    "int | None": int,
    "float": float,
    "float | None": float,
    "tuple[int, int, int] | None": lambda text: tuple(int(size) for size in text.split("x")),
}
_SHORT = {
    "epoch_steps": "epoch",
    "freeze_share": "freeze",
    "encoder_lr": "encoderlr",
    "patch_size": "patch",
    "batch_size": "batch",
    "merging": "merging-",
    "name": "name-",
}


def _written(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"{VARIABLE}: {message}.")
