"""One optimizer step: forward and backward passes, gradients of all ranks, and the update of everything that learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnunet_ssl.learning import check_gradients
from nnunet_ssl.pretraining import distributed
from nnunet_ssl.pretraining.gradients import Gradients, backward, balance, measure, put_together
from nnunet_ssl.pretraining.model import Learner, Network
from nnunet_ssl.pretraining.momentum import move_towards
from nnunet_ssl.pretraining.passes import Branch, Examples, Keys, key_pass, query_passes


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a step did."""

    finite: bool  # otherwise nothing was updated
    stopping: bool  # a process was asked to stop
    figures: list[dict[str, Tensor]]  # for the records, one dictionary per part of the step
    scans: list[str]  # identifiers, for a report about losses that are not finite


def training_step(
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    examples: Iterator[Examples],
    schedule: Mapping[str, float],
    *,
    measured: bool,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Update:
    """Learn from the next examples of every rank.

    Args:
        learner: updated in place, unless a loss or a gradient is not finite on some rank.
        optimizer: over the query network; its learning rate is set already.
        examples: one is taken for each of the step's `accumulation` parts.
        schedule: see :func:`nnunet_ssl.pretraining.optimization.schedules`.
        measured: take each branch's gradient on the encoder apart and measure it.
        stop_requested: whether this process was asked to stop; the ranks tell each other.
    """
    config = learner.config
    shared = list(learner.query.encoder.parameters())
    apart = {} if measured or config.contrastive.max_gradient_ratio is not None else None
    parts: list[tuple[Examples, Keys, list[Branch]]] = []
    optimizer.zero_grad()
    for _ in range(config.accumulation):
        part = next(examples)
        keys = key_pass(learner, part)
        branches = []
        for losses in query_passes(learner, part, keys, schedule):
            backward({name: branch.loss / config.accumulation for name, branch in losses.items()}, shared, apart)
            branches += losses.values()
        parts.append((part, keys, [branch.detached() for branch in branches]))

    figures = collect_gradients(learner.query, shared, apart, config.contrastive.max_gradient_ratio)
    check_gradients(dict(learner.query.named_children()))
    figures["gradient/total"] = nn.utils.clip_grad_norm_(learner.query.parameters(), config.gradient_clip)
    branches = [branch for *_, branches in parts for branch in branches]
    finite = torch.stack([figures["gradient/total"], *(branch.loss for branch in branches)]).isfinite().all()
    spoilt, stopping = distributed.any_rank(~finite, stop_requested(), device=finite.device)
    if not spoilt:
        optimizer.step()
        if learner.key is not None:
            move_towards(learner.key, learner.query, schedule["momentum"])
        remember(learner, parts)
    return Update(
        finite=not spoilt,
        stopping=stopping,
        figures=[figures, *(branch.figures for branch in branches)],
        scans=[scan for part, *_ in parts for batch in part.batches for view in batch.scan_ids for scan in view],
    )


def collect_gradients(
    network: Network, shared: list[nn.Parameter], apart: dict[str, Gradients] | None, max_ratio: float | None
) -> dict[str, Tensor]:
    """Average gradients over ranks; measure, balance and add up those that were taken apart. Returns the figures."""
    distributed.average_([one.grad for one in network.parameters() if one.grad is not None])
    if apart is None:
        return {}
    for gradients in apart.values():
        distributed.average_([one for one in gradients if one is not None])
    figures = measure(apart)
    if max_ratio is not None:
        figures["gradient/balance"] = balance(apart, network.projection.parameters(), max_ratio)
    put_together(apart, shared)
    return figures


@torch.no_grad()
def remember(learner: Learner, parts: list[tuple[Examples, Keys, list[Branch]]]) -> None:
    """Put the keys of all ranks into the queue, and the teacher's mean scores into their running mean."""
    if learner.queue is not None:
        batches = [part.batch for part, *_ in parts]
        views = len(batches[0].views)
        learner.queue.enqueue(
            distributed.gather(torch.cat([keys.projections for _, keys, _ in parts], dim=1), dim=1).flatten(0, 1),
            distributed.gather(torch.cat([batch.subject for batch in batches])).repeat(views),
            distributed.gather(torch.cat([batch.session for batch in batches])).repeat(views),
        )
    centres = [branch.token_centre for *_, branches in parts for branch in branches if branch.token_centre is not None]
    if centres:
        centre = torch.stack(centres).mean(dim=0)
        distributed.average_([centre])
        learner.centre.lerp_(centre, 1 - learner.config.masked.tokens.centre_momentum)
