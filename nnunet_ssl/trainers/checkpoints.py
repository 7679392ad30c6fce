"""Which pre-trained encoder a trainer starts from."""

from __future__ import annotations

import os
from pathlib import Path

from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import folder_of
from nnunet_ssl.weights.pretrained import ENCODER
from nnunet_ssl.weights.zoo import named_checkpoint

VARIABLE = "nnssl_checkpoint"


def explicit_checkpoint() -> Path | None:
    """Return the file that the environment variable ``nnssl_checkpoint`` names, or ``None`` when it is not set.

    The variable may name a file, the folder of a finished pre-training, or published weights (``nnssl_weights list``).

    Raises:
        UserError: the variable is set and there is no such file, or the published weights were not fetched.
    """
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    path = named_checkpoint(value)
    if not path.is_file():
        raise UserError(
            f"{VARIABLE}={value}: there is no file {path}, and no published weights have that name "
            f"(nnssl_weights list). Correct it, or unset {VARIABLE}."
        )
    return path


def find_checkpoint(recipe: str | None, trainer: str, *, residual: bool = False) -> Path:
    """Return ``nnssl_checkpoint``, else the newest finished pre-training of `recipe` under ``$nnUNet_results``.

    Args:
        recipe: such as ``"mcl_mim"``; ``None`` for a trainer that is told its file explicitly.
        trainer: the trainer's name, for the message.
        residual: the plans are made for a residual encoder: a run named after the recipe with ``_resenc`` comes first.

    Raises:
        UserError: there is none; the message says where it looked and what to do.
    """
    if (path := explicit_checkpoint()) is not None:
        return path
    if recipe is None:
        raise UserError(
            f"{trainer} fine-tunes from any checkpoint that nnssl_weights can read, and none was named. "
            f"Name one: export {VARIABLE}=/path/to/checkpoint"
        )
    results = folder_of("nnUNet_results")
    for run in ([f"{recipe}_resenc"] if residual else []) + [recipe]:
        if found := list(results.glob(f"Dataset*/{run}/{ENCODER}")):
            return max(found, key=lambda path: path.stat().st_mtime)
    raise UserError(
        f"{trainer} needs a finished pre-training of the recipe {recipe}, and there is no file "
        f"{results}/Dataset*/{recipe}/{ENCODER}. Three ways out: (1) pre-train one: nnssl_pretrain -c {recipe}; "
        f"(2) point to a checkpoint you have: export {VARIABLE}=/path/to/checkpoint; "
        f"(3) train the same network from scratch: -tr nnUNetTrainerSwinFPNScratch"
    )
