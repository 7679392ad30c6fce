"""What a run leaves behind: its folder, its checkpoints, and the encoder for those who fine-tune it."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nnunet_ssl.architectures.backbones import backbone_of
from nnunet_ssl.architectures.backbones import known as known_backbones
from nnunet_ssl.architectures.fpn import FPNDecoder
from nnunet_ssl.corpus.prepared import Corpus
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import locked, remove_leftovers, written_beside
from nnunet_ssl.nnunet_folders import folder_of
from nnunet_ssl.pretraining.config import PretrainingConfig, from_dict
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.objectives import known
from nnunet_ssl.pretraining.optimization import restore_optimizer
from nnunet_ssl.pretraining.run import checkpointing
from nnunet_ssl.weights.encoders import write_encoder
from nnunet_ssl.weights.pretrained import ENCODER

CONFIG = "config.yaml"

CITATIONS = (
    "Large-scale modality-invariant foundation models for brain MRI analysis: application to lesion segmentation. "
    "arXiv 2511.11311.",
    "Isensee et al. nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation. "
    "Nature Methods 18, 2021.",
)

logger = logging.getLogger(__name__)


SPLIT = ("seed", "validation.fraction")
"""What decides which subjects are held out: another value would validate on subjects that were trained on."""


def results_folder(dataset: str, recipe: str) -> Path:
    """``$nnUNet_results/DatasetXXX_NAME/<recipe>``, of a corpus' full name; it need not exist."""
    return folder_of("nnUNet_results") / dataset / recipe


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other pre-trainings off the results folder, which is made, and clear away what a killed one has left.

    Raises:
        UserError: another one is at work there, or nothing can be written.
    """
    with ExitStack() as stack:
        with _unwritable_explained(folder):
            stack.enter_context(locked(folder, "nnssl_pretrain"))
            remove_leftovers(folder)
        yield


@contextmanager
def _unwritable_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"The results cannot be written to {folder}: {error}. Set nnUNet_results elsewhere.") from error


def refuse_to_overwrite(folder: Path) -> None:
    """Refuse to begin a run where there is one.

    Raises:
        UserError: `folder` holds checkpoints, or what a run ends with.
    """
    if checkpointing.numbered(folder):
        raise UserError(
            f"{folder} holds a run of this recipe already. Continue it with --c, give this one another name with "
            "--set recipe=..., or remove the folder."
        )
    for name in (ENCODER, checkpointing.FINAL):
        if (folder / name).exists():
            raise UserError(
                f"{folder} holds {name} and no run that could be continued; this one would overwrite the file. Give it "
                "another name with --set recipe=..., or move the file."
            )


def reopen(folder: Path) -> None:
    """Remove what says that the run is finished, because it goes on."""
    if (folder / ENCODER).exists():
        logger.info("The run goes on: %s, of its earlier end, is removed until the new end.", folder / ENCODER)
    for name in (ENCODER, checkpointing.FINAL):
        (folder / name).unlink(missing_ok=True)


def write_settings(folder: Path, config: PretrainingConfig) -> None:
    """Write the resolved configuration beside the results, the first file of a run.

    Raises:
        UserError: nothing can be written there.
    """
    with _unwritable_explained(folder), written_beside(folder / CONFIG) as temporary:
        temporary.write_text(config.as_yaml())


def description(corpus: Corpus, config: PretrainingConfig) -> dict[str, Any]:
    """What a reader of the weights should know, in plain types; counts of the corpus, no identifiers."""
    return {
        "config": config.as_dict(),
        "corpus": corpus.summary(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("nnunet_ssl", "nnunetv2", "torch")},
        },
        "citations": [
            *CITATIONS,
            backbone_of(config.backbone).citation,
            *(text for objective in config.objectives for text in objective.citations),
        ],
    }


def checkpoint_state(
    learner: Learner, optimizer: torch.optim.Optimizer, corpus: Corpus, *, step: int, skipped: int
) -> dict[str, Any]:
    """Everything that an exact continuation needs, and everything that :func:`write_encoder` is told.

    No state of random generators: every draw of the loop follows from the seed and the step.
    """
    config = learner.config
    return {
        "format": "nnunet_ssl",
        "method": config.recipe,
        "step": step,
        "skipped": skipped,
        "architecture": config.architecture(),
        "preprocessing": corpus.preprocessing,
        "metadata": description(corpus, config),
        "roster": roster(corpus),
        "learner": learner.state_dict(),
        "optimizer": optimizer.state_dict(),
    }


def roster(corpus: Corpus) -> str:
    """A digest of the names of all subjects and sessions: while it stays, so do their numbers, which are ranks."""
    names = [sorted(corpus.scans[column].unique()) for column in ("subject", "session")]
    return hashlib.blake2b(json.dumps(names).encode(), digest_size=16).hexdigest()


def restore(folder: Path, learner: Learner, optimizer: torch.optim.Optimizer, corpus: Corpus) -> tuple[int, int] | None:
    """Load the newest checkpoint into `learner` and `optimizer`.

    Returns:
        The number of steps done and of steps skipped; None when there is no checkpoint.

    Raises:
        UserError: the checkpoint is of another architecture or recipe, or cannot be read; there is none, and
            :func:`refuse_to_overwrite` finds something.
    """
    state = checkpointing.load(folder)
    if state is None:
        refuse_to_overwrite(folder)
        logger.warning("There is no checkpoint in %s to continue from: the run begins at step 0.", folder)
        return None
    changes = list(_changes(from_dict(state["metadata"]["config"]).as_dict(), learner.config.as_dict()))
    shapes = ("backbone", "balance", *known_backbones(), *(shape for kind in known() for shape in kind.shapes))
    fatal = [text for key, text in changes if key.startswith((*shapes, *SPLIT))]
    fatal += [f"the corpus' {text}" for _, text in _changes(state["preprocessing"], corpus.preprocessing)]
    if fatal:
        raise UserError(
            f"The checkpoint in {folder} cannot be continued with these settings: {'; '.join(fatal)}. "
            "Continue with the settings it began with, or start another run with --set recipe=..."
        )
    for _, text in changes:
        logger.warning("Continuing with a changed setting: %s.", text)
    if state["metadata"]["corpus"] != corpus.summary():
        logger.warning("The corpus has changed since the checkpoint was written: other scans will be drawn.")
    learner.load_state_dict(state["learner"])
    restore_optimizer(optimizer, state["optimizer"])
    if state.get("roster", roster(corpus)) != roster(corpus):
        _forget_subjects(learner)
    return state["step"], state["skipped"]


def _forget_subjects(learner: Learner) -> None:
    """Let the objectives forget whom they knew: subjects and sessions have other numbers now."""
    told = [objective.forget_subjects(learner.state_of(objective)) for objective in learner.config.objectives]
    logger.warning(
        "The subjects or sessions of the corpus are not those that the checkpoint was written with: %sthe subjects "
        "held out for validation may have changed, so its figures do not compare with earlier ones.",
        "".join(f"{text}, and " for text in told if text),
    )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, sentence) for each setting that differs."""
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) or isinstance(new, Mapping):
            yield from _changes(old or {}, new or {}, f"{where}{key}.")
        elif old != new:
            yield f"{where}{key}", f"{where}{key} was {old}, is {new}"


def write_final(folder: Path, learner: Learner, corpus: Corpus, *, step: int) -> None:
    """Name the last checkpoint the final one, and write the encoder: the sign of a finished run."""
    checkpointing.share(folder / checkpointing.LATEST, folder / checkpointing.FINAL)
    config = learner.config
    write_encoder(
        folder / ENCODER,
        learner.query.encoder.state_dict(),
        architecture=config.architecture(),
        method=config.recipe,
        step=step,
        preprocessing=corpus.preprocessing,
        metadata=description(corpus, config),
        decoder=_decoder(learner),
    )


def _decoder(learner: Learner) -> dict[str, torch.Tensor]:
    """The head that rebuilds volumes from the encoder's maps, with which a fine-tuning may go on; empty without one."""
    heads = [learner.query.get_submodule(objective.head_name) for objective in learner.config.objectives]
    return next((head.state_dict() for head in heads if isinstance(head, FPNDecoder)), {})
