"""What an arm starts from: its own pre-training, a named checkpoint, what its trainer finds, or random weights."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import folder_of, folders_with_id
from nnunet_ssl.studies.places import pretrained_encoder
from nnunet_ssl.studies.stage import NOTE
from nnunet_ssl.studies.study import Arm, Measurement, Run, Study
from nnunet_ssl.trainers import checkpoints
from nnunet_ssl.trainers.networks import plans_residual_unet
from nnunet_ssl.weights.zoo import named_checkpoint

if TYPE_CHECKING:
    from nnunet_ssl.trainers.finetuning import nnUNetTrainerSSL


def start_of(arm: str, study: Study) -> str:
    """What the models start from that an arm keeps in the study; "" of an arm that keeps none."""
    pretraining = study.pretraining_of(arm, seed=0)
    return f"the pre-training of {pretraining.arm}" if pretraining else study.arms[arm].checkpoint or ""


def refuse_another_start(arm: str, study: Study, folder: Path) -> None:
    """Refuse an arm whose models in the study began otherwise than the study says now.

    Raises:
        UserError: they did.
    """
    note, now = folder / "models" / arm / NOTE, start_of(arm, study)
    if now and note.is_file() and (before := note.read_text()) != now:
        raise UserError(
            f"The models of {arm} start from {before}, and now are to start from {now}. {another_folder(folder)}"
        )


def another_folder(folder: Path) -> str:
    """What to do about a study whose file has changed too much."""
    return (
        "What was made from it is of no use to the study as it is now: give that another folder (-o), or remove "
        f"{folder}."
    )


def checkpoint_of(run: Run | Measurement, study: Study, folder: Path, *, residual: bool) -> Path:
    """The file that an arm starts from, found as its trainer finds it (see :func:`checkpoints.find_checkpoint`).

    Raises:
        UserError: there is none.
    """
    arm = study.arms[run.arm]
    if pretraining := study.pretraining_of(run.arm, run.seed):
        path = pretrained_encoder(pretraining, folder)
        if not path.is_file():
            raise UserError(f"The arm {arm.label} is pre-trained first: {pretraining.id}.")
        return path
    if arm.checkpoint is not None:
        return named_encoder(arm.checkpoint, arm)
    recipe = getattr(own_trainers().get(arm.trainer), "recipe", None)
    try:
        return checkpoints.find_checkpoint(recipe, arm.trainer, residual=residual)
    except UserError:
        advice = f"pre-train one (nnssl_pretrain -c {recipe}), or name" if recipe else "name"
        raise UserError(f"The arm {arm.label} has no checkpoint: {advice} one as its `checkpoint`.") from None


def named_encoder(checkpoint: str, arm: Arm) -> Path:
    """The file that the study's YAML names for an arm.

    Raises:
        UserError: it is not there.
    """
    path = named_checkpoint(os.path.expandvars(checkpoint))
    if not path.is_file():
        raise UserError(f"The arm {arm.label} names the checkpoint {checkpoint}, which is not there.")
    return path


def trains_residual(study: Study) -> bool:
    """Tell whether the study's trainings, as far as their data are planned, take residual encoders."""
    preprocessed = folder_of("nnUNet_preprocessed")
    plans = [
        folder / f"{study.plans}.json"
        for dataset in study.datasets.values()
        for folder in folders_with_id(preprocessed, dataset.id)
    ]
    return any(plans_residual_unet(json.loads(path.read_text())) for path in plans if path.is_file())


def needs_checkpoint(arm: Arm) -> bool:
    """Tell whether an arm's trainer starts from an encoder."""
    trainer = own_trainers().get(arm.trainer)
    return trainer is not None and not trainer.from_scratch


@cache
def own_trainers() -> dict[str, type[nnUNetTrainerSSL]]:
    """The trainers of this package, by name."""
    from nnunet_ssl.trainers.arms import ARMS, nnUNetTrainerSwinFPNScratch
    from nnunet_ssl.trainers.finetuning import nnUNetTrainerSSL

    return ARMS | {one.__name__: one for one in (nnUNetTrainerSSL, nnUNetTrainerSwinFPNScratch)}
