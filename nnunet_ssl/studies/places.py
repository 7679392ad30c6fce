"""Where the results of a study lie in its folder."""

from __future__ import annotations

from pathlib import Path

from nnunet_ssl.nnunet_folders import folders_with_id
from nnunet_ssl.studies.study import AnyRun, Pretraining
from nnunet_ssl.weights.pretrained import ENCODER


def results_of(run: AnyRun, folder: Path) -> Path:
    """Where the evaluations of a run lie."""
    return folder / "results" / run.id


def pretrained(run: Pretraining, folder: Path) -> Path:
    """The folder of a pre-training's results; it is there once the pre-training has begun."""
    corpora = folders_with_id(folder / "pretrained", run.corpus) or [folder / "pretrained" / f"Dataset{run.corpus:03d}"]
    return corpora[0] / run.name


def pretrained_encoder(run: Pretraining, folder: Path) -> Path:
    """What a pre-training leaves when it is finished."""
    return pretrained(run, folder) / ENCODER


def own_nnunet_folders(folder: Path) -> dict[str, str]:
    """nnU-Net's folders of a study that makes its data itself, by the variables that name them."""
    return {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
