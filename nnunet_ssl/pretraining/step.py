"""One optimizer step: forward and backward passes, gradients of all ranks, and the update of everything that learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnunet_ssl.learning import check_gradients
from nnunet_ssl.pretraining import distributed
from nnunet_ssl.pretraining.gradients import Gradients, backward_by_branch, balance, measure, sum_into
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.momentum import move_towards
from nnunet_ssl.pretraining.objectives.base import Examples, Part
from nnunet_ssl.pretraining.passes import key_pass, query_passes


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
        measured: keep each branch's gradient on the encoder by itself and measure it.
        stop_requested: whether this process was asked to stop; the ranks tell each other.
    """
    config = learner.config
    shared = list(learner.query.encoder.parameters())
    limits = {one.name: one.max_gradient_ratio for one in config.objectives if one.max_gradient_ratio is not None}
    by_branch: dict[str, Gradients] = {}
    parts: dict[str, list[Part]] = {objective.name: [] for objective in config.objectives}
    scans = []
    optimizer.zero_grad()
    for _ in range(config.accumulation):
        part = next(examples)
        taught = key_pass(learner, part)
        for branches in query_passes(learner, part, taught, schedule):
            losses = {name: branch.loss / config.accumulation for name, branch in branches.items()}
            if measured or limits:
                backward_by_branch(losses, shared, by_branch)
            else:
                torch.autograd.backward([*losses.values()])
            for name, branch in branches.items():
                parts[name].append(Part(examples=part, taught=taught.get(name), branch=branch.detached()))
        scans += [scan for batch in part.batches for view in batch.scan_ids for scan in view]

    figures = collect_gradients(learner, shared, by_branch, limits)
    check_gradients(dict(learner.query.named_children()))
    figures["gradient/total"] = nn.utils.clip_grad_norm_(learner.query.parameters(), config.gradient_clip)
    results = [part.branch for of_branch in parts.values() for part in of_branch]
    finite = torch.stack([figures["gradient/total"], *(branch.loss for branch in results)]).isfinite().all()
    spoilt, stopping = distributed.any_rank(~finite, stop_requested(), device=finite.device)
    if not spoilt:
        optimizer.step()
        if learner.key is not None:
            move_towards(learner.key, learner.query, schedule["momentum"])
        remember(learner, parts)
    return Update(
        finite=not spoilt,
        stopping=stopping,
        figures=[figures, *(branch.figures for branch in results)],
        scans=scans,
    )


def collect_gradients(
    learner: Learner, shared: list[nn.Parameter], by_branch: Mapping[str, Gradients], limits: Mapping[str, float]
) -> dict[str, Tensor]:
    """Average gradients over ranks; measure, balance and add up those kept by branch, if any. Returns the figures."""
    distributed.average_([one.grad for one in learner.query.parameters() if one.grad is not None])
    if not by_branch:
        return {}
    for gradients in by_branch.values():
        distributed.average_([one for one in gradients if one is not None])
    heads = {one.name: learner.query.get_submodule(one.head_name) for one in learner.config.objectives}
    figures = measure(by_branch) | balance(by_branch, heads, limits)
    sum_into(by_branch, shared)
    return figures


@torch.no_grad()
def remember(learner: Learner, parts: Mapping[str, list[Part]]) -> None:
    """Let every objective update its state."""
    for objective in learner.config.objectives:
        objective.remember(learner.state_of(objective), parts[objective.name])
