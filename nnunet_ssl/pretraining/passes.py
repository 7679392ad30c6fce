"""One step's forward computation: the key network's pass, then the query network's for each branch, and the losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nnunet_ssl.architectures.masking import expand_mask
from nnunet_ssl.pretraining.augmentation import Batch
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.objectives.contrastive import symmetric_info_nce
from nnunet_ssl.pretraining.objectives.masked import error_of_the_mean, reconstruction_error
from nnunet_ssl.pretraining.objectives.tokens import distillation


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The views of a step, or of a part of one: pairs (without a contrastive branch: single scans), and the scans that
    cannot form a pair, for the masked branch alone."""

    batch: Batch
    unpaired: Batch | None
    mask: Tensor | None  # (N, *grid) bool for the N views of `batch`, then of `unpaired`; None without a masked branch

    @property
    def batches(self) -> list[Batch]:
        return [self.batch] if self.unpaired is None else [self.batch, self.unpaired]

    @property
    def paired_views(self) -> Tensor:
        """(V * B, 1, X, Y, Z)"""
        return self.batch.views.flatten(0, 1)

    @property
    def views(self) -> Tensor:
        """(N, 1, X, Y, Z)"""
        return torch.cat([part.views.flatten(0, 1) for part in self.batches])

    @property
    def targets(self) -> Tensor:
        """(N, 1, X, Y, Z)"""
        return torch.cat([part.targets.flatten(0, 1) for part in self.batches])


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What the key network makes of whole views."""

    projections: Tensor | None = None  # (V, B, D)
    tokens: Tensor | None = None  # (N, tokens, K): for each view, the scores of the view that it is to tell


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A branch's loss, already weighted, and figures for the record, all scalar tensors."""

    loss: Tensor
    figures: dict[str, Tensor]
    token_centre: Tensor | None = None  # (K,) mean score of the teacher

    def detached(self) -> Branch:
        """The same without the graph behind the loss."""
        return replace(self, loss=self.loss.detach())


@torch.no_grad()
def key_pass(learner: Learner, examples: Examples) -> Keys:
    """Let the key network look at whole views."""
    if learner.key is None:
        return Keys()
    wants_tokens = learner.config.masked.target == "tokens"
    maps = learner.key.encode(examples.views if wants_tokens else examples.paired_views)
    by_view = examples.batch.views.shape[:2]
    paired = by_view.numel()
    projections = tokens = None
    if learner.config.has_contrastive:
        projections = learner.key.project([maps[-1][:paired]]).unflatten(0, by_view)
    if wants_tokens:
        scores = learner.key.score_tokens(maps)
        of_other_view = scores[:paired].unflatten(0, by_view).flip(0).flatten(0, 1)
        tokens = torch.cat([of_other_view, scores[paired:]])
    return Keys(projections=projections, tokens=tokens)


def query_passes(
    learner: Learner, examples: Examples, keys: Keys, schedule: Mapping[str, float]
) -> Iterator[dict[str, Branch]]:
    """Yield the branches pass by pass.

    Whoever runs the backward pass before asking for the next one holds a single graph in memory at a time. With
    `shared_pass` there is one pass: the queries, too, come from views with hidden cells.
    """
    config = learner.config
    if config.shared_pass:
        maps = learner.query.encode(examples.views, examples.mask)
        yield {
            "contrastive": contrastive_branch(learner, maps, examples, keys, schedule),
            "masked": masked_branch(learner, maps, examples, keys, schedule),
        }
        return
    if config.has_contrastive:
        maps = learner.query.encode(examples.paired_views)
        yield {"contrastive": contrastive_branch(learner, maps, examples, keys, schedule)}
    if config.has_masked:
        maps = learner.query.encode(examples.views, examples.mask)
        yield {"masked": masked_branch(learner, maps, examples, keys, schedule)}


def contrastive_branch(
    learner: Learner, maps: Sequence[Tensor], examples: Examples, keys: Keys, schedule: Mapping[str, float]
) -> Branch:
    """Each view's query is to find the other view's key among those of other subjects."""
    by_view = examples.batch.views.shape[:2]
    queries = learner.query.project([maps[-1][: by_view.numel()]])
    result = symmetric_info_nce(
        queries.unflatten(0, by_view),
        keys.projections,
        examples.batch.subject,
        learner.queue.keys,
        learner.queue.subjects,
        learner.config.contrastive.temperature,
    )
    figures = {
        "loss/contrastive": result.loss.detach(),
        "contrastive/accuracy": result.accuracy,
        "contrastive/negatives": result.negatives,
    }
    weight = schedule.get("contrastive_weight", 1.0)  # a branch by itself has none: it would only scale the gradient
    return Branch(loss=weight * result.loss, figures=figures)


def masked_branch(
    learner: Learner, maps: Sequence[Tensor], examples: Examples, keys: Keys, schedule: Mapping[str, float]
) -> Branch:
    """Tell what the hidden cells hold: their intensities, or the key network's tokens of the other view."""
    if learner.config.masked.target == "voxels":
        return _voxel_branch(learner, maps, examples)
    return _token_branch(learner, maps, examples, keys, schedule)


def _voxel_branch(learner: Learner, maps: Sequence[Tensor], examples: Examples) -> Branch:
    targets, stride = examples.targets, learner.config.stride
    prediction = learner.query.reconstruct(maps, targets.shape[2:])
    loss = reconstruction_error(prediction, targets, examples.mask, stride).mean()
    with torch.no_grad():
        of_mean = error_of_the_mean(targets, examples.mask, stride).mean()
    figures = {"loss/masked": loss.detach(), "masked/error_over_mean": loss.detach() / of_mean}
    return Branch(loss=learner.config.masked.weight * loss, figures=figures)


def _token_branch(
    learner: Learner, maps: Sequence[Tensor], examples: Examples, keys: Keys, schedule: Mapping[str, float]
) -> Branch:
    config = learner.config.masked
    places = learner.config.stride // learner.query.encoder.strides[config.tokens.level]
    hidden = expand_mask(examples.mask, maps[config.tokens.level].shape[2:], places).flatten(1)
    result = distillation(
        learner.query.score_tokens(maps),
        keys.tokens,
        hidden,
        learner.centre,
        student_temperature=config.tokens.student_temperature,
        teacher_temperature=schedule["teacher_temperature"],
    )
    figures = {"loss/masked": result.loss.detach(), "masked/prototypes_used": result.perplexity}
    return Branch(loss=config.weight * result.loss, figures=figures, token_centre=result.centre)
