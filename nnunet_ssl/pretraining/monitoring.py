"""What is measured on held-out subjects: the losses, alignment, and what the objectives want to know."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from nnunet_ssl.architectures.compiling import uncompiled
from nnunet_ssl.architectures.networks import pooled
from nnunet_ssl.corpus.modalities import UNKNOWN
from nnunet_ssl.corpus.prepared import Corpus
from nnunet_ssl.corpus.store import UnreadableScan
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining import distributed
from nnunet_ssl.pretraining.config import PretrainingConfig
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.objectives.base import HeldOut
from nnunet_ssl.pretraining.passes import key_pass, query_passes
from nnunet_ssl.pretraining.run.records import Records
from nnunet_ssl.pretraining.views.streams import Stream
from nnunet_ssl.representation import cross_modality_distance, cross_subject_distance, effective_rank

logger = logging.getLogger(__name__)


class Validation:
    """Measures on subjects that are not trained on, the same scans and masks every time.

    Args:
        corpus: the held-out subjects. Scans that cannot be read are left out, with a warning.
        config: the recipe.
        device: of this process.

    Raises:
        UserError: not one of the held-out scans can be read.
    """

    def __init__(self, corpus: Corpus, config: PretrainingConfig, device: torch.device) -> None:
        corpus = corpus.readable()
        # What a damaged scan gives way to here is another draw, however often: it must not end a training.
        config = replace(config, sampling=replace(config.sampling, max_failed_share=1.0))
        self.open_stream = functools.partial(Stream, corpus, config, device=device, start=0, workers=0)
        self.batches = config.validation.batches
        try:
            self.open_stream()
        except UserError as error:
            logger.warning("No losses will be taken on the held-out subjects. %s", error)
            self.batches = 0
        self.held_out = read_held_out(corpus, config) if distributed.is_main() else None

    @torch.no_grad()
    @uncompiled()  # few batches, without gradients and of several sizes: graphs of their own, before the first step
    def measure(
        self, learner: Learner, schedule: Mapping[str, float], records: Records, *, step: int
    ) -> dict[str, float]:
        """Add the held-out losses of this rank's batches to `records`; return what the main process alone measures."""
        if self.batches:
            for examples in itertools.islice(self.open_stream(), self.batches):
                for losses in query_passes(learner, examples, key_pass(learner, examples), schedule):
                    for branch in losses.values():
                        records.add({f"validation/{name}": value for name, value in branch.figures.items()})
        if self.held_out is None or not len(self.held_out.patches):
            return {}
        figures = alignment(learner, self.held_out)
        for objective in learner.config.objectives:
            own, pictures = objective.held_out_figures(learner.query, self.held_out, step=step)
            figures |= own
            for name, picture in pictures.items():
                records.picture(name, picture, step)
        return figures


def read_held_out(corpus: Corpus, config: PretrainingConfig) -> HeldOut:
    """Read one scan of each known modality from up to `validation.sessions` sessions, different subjects first.

    Scans that cannot be read are left out, with a warning.

    Raises:
        UserError: not one can be read.
    """
    scans = corpus.scans[corpus.scans["modality"] != UNKNOWN]
    scans = scans.drop_duplicates(["session_index", "modality"])
    modalities = scans.groupby("session_index")["modality"].transform("size")
    visit = scans.groupby("subject_index")["session_index"].rank(method="dense")
    scans = scans.assign(several=modalities > 1, visit=visit)
    scans = scans.sort_values(["several", "visit", "session_index"], ascending=[False, True, True], kind="stable")
    chosen = scans["session_index"].drop_duplicates().head(config.validation.sessions)
    scans = scans[scans["session_index"].isin(chosen)]
    patches, failures = {}, []
    for row in scans.index:
        try:
            patches[row] = corpus.read_central_patch(row, config.patch_size).astype(np.float16)
        except UnreadableScan as failure:
            failures.append(failure)
    corpus.warn_of_unreadable(failures, len(scans))
    scans = scans.loc[list(patches)]
    return HeldOut(
        patches=torch.from_numpy(np.stack([*patches.values()])) if patches else torch.zeros(0, 1, *config.patch_size),
        subject=scans["subject_index"].to_numpy(),
        modality=scans["modality"].to_numpy(str),
    )


@torch.no_grad()
def alignment(learner: Learner, held_out: HeldOut) -> dict[str, float]:
    """The paper's two figures on the pooled bottleneck, and how many directions it uses; nothing where data lack."""
    device = next(learner.parameters()).device
    parts = held_out.patches.split(learner.config.batch_size)
    pooled_parts = [pooled(learner.query.encode(part.to(device).float())[-1]).float().cpu() for part in parts]
    embeddings = torch.cat(pooled_parts).numpy()
    aligned = cross_modality_distance(embeddings, held_out.subject, held_out.modality)
    figures = {
        "validation/cross_modality_distance": aligned.mean,
        "validation/cross_subject_distance": cross_subject_distance(embeddings, held_out.subject).mean,
        "validation/effective_rank": effective_rank(embeddings),
    }
    return {name: value for name, value in figures.items() if not math.isnan(value)}
