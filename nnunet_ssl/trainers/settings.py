"""The settings of fine-tuning, read from one environment variable and written into the plans and their name."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nnunet_ssl.architectures.swin import Merging
from nnunet_ssl.errors import UserError, require
from nnunet_ssl.trainers.recipes import OptimizerName, RecipeName, ScheduleName, with_brought
from nnunet_ssl.typed import build, check_ranges, keywords_of_line, ranged

VARIABLE = "nnssl_settings"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a fine-tuning goes; the defaults are the recipe of arXiv 2511.11311.

    Attributes:
        recipe: a word for what the settings were before single ones were named, see :data:`recipes.RECIPES`.
        steps: optimizer steps in all.
        epoch_steps: optimizer steps in one of nnU-Net's epochs; validation, logging and checkpoints follow each.
        schedule: ``paper``: the decoder's rate follows one curve over all steps, the encoder's begins when it is
            unfrozen; ``warmup``: both learn from the first step; ``sawtooth``: the decoder alone, then both, each
            time with a rise and a fall.
        freeze_share: share of the steps, from the start, in which a pre-trained encoder stays as it is.
        warmup_share: share of the steps over which learning rates rise.
        decay: how they fall: ``cosine``, or nnU-Net's ``poly``.
        optimizer: ``adamw``, ``sgd`` as nnU-Net has it, or ``adamw_primus``, of the recipe ``primus``.
        lr: peak learning rate of decoder and head.
        encoder_lr: peak learning rate of the encoder; if not given, a tenth of `lr` for a pre-trained encoder in the
            paper's schedule, `lr` itself in the others and for an encoder that starts from scratch.
        loss: ``dice_ce``: nnU-Net's default (Dice + BCE for regions); ``dice_topk``: the cross-entropy of the hardest
            tenth of the voxels in place of all.
        augmentation: where nnU-Net's augmentation is done: ``cpu``, by its workers, patch by patch; ``gpu``, on the
            training device, whichever that is, batch by batch.
        decoder: ``random``: the backbone's own, from random weights: the FPN, or nnU-Net's for a residual encoder;
            ``pretrained``: the one that the checkpoint holds, but for its head; ``unet``: a U-Net's for a Swin
            encoder, with a skip at full resolution, from random weights.
        deep_supervision: whether a U-Net decoder learns at all its scales; if not given, it does. The FPN has one.
        average_share: the final weights are the mean of those after each epoch in the last share of the steps; 0: the
            last.
        patch_size: patch in voxels, in the plans' axis order; if not given, the plans'.
        batch_size: patches per step; if not given, the plans'.
        fraction: per cent of the fold's training subjects to train on; smaller fractions are subsets of larger ones.
        channels: ``all``: every case has all of the data set's channels; ``any``: cases may lack some, in training and
            in prediction, in the way that `channels.ANY` names; ``zeros``, ``scaled``, ``pooled``, ``modulated``: that
            way, see `architectures.channels.any_channels`.
        channel_drop: the probability with which a channel is left out of a training sample, for all or for each.
        merging: how the encoder merges patches, of a Swin checkpoint whose file does not tell it, a key of
            :data:`architectures.swin.MERGINGS`.
        seed: draws the order of subjects for `fraction`, and the initial weights of what is not pre-trained.
        name: keeps apart what no other setting does, such as models that start from different checkpoints.
    """

    recipe: RecipeName = "paper"
    steps: int = ranged(5000, "at least 1")
    epoch_steps: int = ranged(250, "at least 1")
    schedule: ScheduleName = "paper"
    freeze_share: float = ranged(0.3, "at least 0 and below 1")
    warmup_share: float = ranged(0.05, "at least 0 and below 1")
    decay: Literal["cosine", "poly"] = "cosine"
    optimizer: OptimizerName = "adamw"
    lr: float = ranged(5e-4, "above 0 and below 1")
    encoder_lr: float | None = ranged(None, "above 0 and below 1")
    loss: Literal["dice_ce", "dice_topk"] = "dice_ce"
    augmentation: Literal["cpu", "gpu"] = "cpu"
    decoder: Literal["random", "pretrained", "unet"] = "random"
    deep_supervision: bool | None = None
    average_share: float = ranged(0.0, "at least 0 and below 1")
    patch_size: tuple[int, int, int] | None = ranged(None, "at least 1")
    batch_size: int | None = ranged(None, "at least 1")
    fraction: int = ranged(100, "1 to 100")
    channels: Literal["all", "any", "zeros", "scaled", "pooled", "modulated"] = "all"
    channel_drop: tuple[float, ...] = ranged((0.5,), "at least 0 and below 1")
    merging: Merging | None = None
    seed: int = ranged(0, "0 or more")
    name: str = ""

    def __post_init__(self) -> None:
        check_ranges(self)
        require(
            self.steps % min(self.epoch_steps, self.steps) == 0,
            f"steps is {self.steps}, which is not a whole number of epochs of epoch_steps={self.epoch_steps}",
        )
        require(
            re.fullmatch("[A-Za-z0-9]*", self.name) is not None,
            f"name is '{self.name}'; it may hold letters and digits",
        )
        require(
            self.channels != "all" or self.channel_drop == (0.5,),
            "channel_drop leaves channels out of training samples, which takes a network for it: add channels=any",
        )
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Refuse settings that contradict each other."""
        require(
            self.schedule != "warmup" or self.freeze_share == 0,
            f"schedule=warmup trains all from the first step, so freeze_share={self.freeze_share} contradicts it; "
            "schedule=sawtooth trains the decoder first",
        )
        require(
            self.schedule != "sawtooth" or round(self.freeze_share * self.steps) > 0,
            f"schedule=sawtooth trains the decoder first, and freeze_share={self.freeze_share} of steps={self.steps} "
            "is no step; schedule=warmup trains all from the first step",
        )
        rising = self.freeze_share + self.warmup_share
        require(
            self.schedule == "paper" or rising < 1,
            f"freeze_share={self.freeze_share} and warmup_share={self.warmup_share} take all steps, and schedule="
            f"{self.schedule} would never decay",
        )
        require(
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
        return build(cls, plans.get("nnunet_ssl", {}).get("settings", {}))

    def updated(self, text: str) -> Settings:
        """Return these settings with those of `text` (``"steps=500, lr=0.001"``) in their place.

        A recipe, a schedule or an optimizer brings others along, see :func:`recipes.with_brought`.

        Raises:
            UserError: an unknown key, a value of the wrong kind or out of range, or values that contradict each other.
        """
        try:
            return Settings(**with_brought(dataclasses.asdict(self), keywords_of_line(Settings, text)))
        except UserError as error:
            raise UserError(f"{VARIABLE}: {error}") from None

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
    "augmentation": "augmentation-",
    "decoder": "decoder-",
    "deep_supervision": "deepsupervision-",
    "average_share": "average",
    "patch_size": "patch",
    "batch_size": "batch",
    "channels": "channels-",
    "channel_drop": "channeldrop",
    "merging": "merging-",
    "name": "name-",
}


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
