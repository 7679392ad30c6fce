"""What the folds would have said of the cases that they held out without mirroring: nnU-Net's own validation."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.out_of_fold import UNMIRRORED, VALIDATION

logger = logging.getLogger(__name__)


def predict_unmirrored(model: Path, device: torch.device) -> None:
    """Write for each fold ``validation_unmirrored``, as its ``validation`` is but without mirroring, where it lacks.

    The trainer validates as it did at the end of the training: the same preprocessed images, the same windows.

    Raises:
        UserError: the data set is not preprocessed on this machine, a fold is not trained to its end, or the folder
            has another name than nnU-Net gave it.
    """
    named = model.absolute().name.split("__")
    if len(named) != 3:
        raise UserError(f"{model} is not called TRAINER__PLANS__CONFIGURATION, which tells how to predict by it.")
    trainer_name, plans, configuration = named
    from nnunetv2.run.run_training import get_trainer_from_args

    for fold in sorted(model.glob("fold_*")):
        if fold.name == "fold_all" or _is_complete(fold):
            continue
        checkpoint = fold / "checkpoint_final.pth"
        if not checkpoint.is_file():
            raise UserError(f"{fold} has no {checkpoint.name}: train it to the end.")
        number = int(fold.name.removeprefix("fold_"))
        trainer = get_trainer_from_args(
            model.absolute().parent.name, configuration, number, trainer_name, plans, device=device
        )
        trainer.load_checkpoint(str(checkpoint))
        trainer.inference_allowed_mirroring_axes = None
        place = fold / ".unmirrored"
        place.mkdir(exist_ok=True)
        trainer.output_folder = str(place)
        trainer.perform_actual_validation(save_probabilities=True)
        shutil.rmtree(fold / UNMIRRORED, ignore_errors=True)
        (place / VALIDATION).rename(fold / UNMIRRORED)


def _is_complete(fold: Path) -> bool:
    """Whether all that was validated is there without mirroring, and not older."""
    wanted = list((fold / VALIDATION).glob("*.npz"))
    made = [fold / UNMIRRORED / path.name for path in wanted]
    return all(path.is_file() and path.stat().st_mtime >= old.stat().st_mtime for path, old in zip(made, wanted))
