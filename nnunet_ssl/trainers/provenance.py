"""Where a model's encoder comes from: recorded beside its folds, which must all have started from the same file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.plans import SECTION, saved_plans


def source_of(checkpoint: Path) -> dict[str, str]:
    """Return what identifies a checkpoint: its path, and the SHA-256 of its bytes."""
    return {"file": str(checkpoint), "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()}


def refuse_to_mix(
    model_folder: Path, fold: int | str, configuration: str, network: Mapping[str, Any], source: Mapping[str, str]
) -> None:
    """Keep models apart that nnU-Net would put into one folder, whose name tells nothing of checkpoints.

    All folds share one plans file, so one of another network would break the others' prediction. And a fold that starts
    from another checkpoint would overwrite a finished one, or enter an ensemble with folds that it does not belong to.

    Args:
        network: the plans' entry for the network to be trained.
        source: of the checkpoint to start from, see :func:`source_of`; empty from scratch.

    Raises:
        UserError: `model_folder` holds folds of another network, or this or other folds from another checkpoint.
    """
    folds = {path.parent.name for path in model_folder.glob("fold_*/checkpoint_*.pth")}
    if not folds:
        return
    saved = saved_plans(model_folder)
    known = saved.get(SECTION, {}).get("pretrained", {})
    if source and source["sha256"] != known.get("sha256", source["sha256"]):
        raise UserError(
            f"{model_folder} holds {', '.join(sorted(folds))} from another checkpoint ({known['file']}) than "
            f"{source['file']}. Give this model a name of its own (nnssl_settings=name=...), name the other checkpoint "
            "(nnssl_checkpoint), or move the folder away."
        )
    others = folds - {f"fold_{fold}"}
    if others and saved["configurations"][configuration]["architecture"] != network:
        raise UserError(
            f"{model_folder} holds {', '.join(sorted(others))} of another network than the checkpoint chosen now. "
            "Name the checkpoint of those folds (nnssl_checkpoint), or move them away."
        )
