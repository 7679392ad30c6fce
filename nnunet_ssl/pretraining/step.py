"""One optimizer step: forward and backward passes, gradients of all ranks, and the update of everything that learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnunet_ssl.architectures.backbones.base import parameters_by_depth
from nnunet_ssl.learning import check_gradients
from nnunet_ssl.pretraining import distributed
from nnunet_ssl.pretraining.gradients import (
    PREFIX,
    Gradients,
    backward_by_branch,
    clip_factors,
    measure,
    measure_by_depth,
    moving_norms,
    norm_weights,
    ratio_factors,
    scale,
    sum_into,
)
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.momentum import move_towards
from nnunet_ssl.pretraining.objectives.base import Examples, Part
from nnunet_ssl.pretraining.optimization import BranchAdamW, trained_parameters
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
        optimizer: over the query network, a :class:`nnunet_ssl.pretraining.optimization.BranchAdamW` where the recipe
            gives branches learning rates; its learning rate is set already.
        examples: one is taken for each of the step's `accumulation` parts.
        schedule: see :func:`nnunet_ssl.pretraining.optimization.schedules`.
        measured: keep each branch's gradient on the encoder by itself and measure it.
        stop_requested: whether this process was asked to stop; the ranks tell each other.
    """
    config = learner.config
    shared = list(learner.query.encoder.parameters())
    apart = measured or config.balance != "sum" or any(one.max_gradient_ratio is not None for one in config.objectives)
    by_branch: dict[str, Gradients] = {}
    parts: dict[str, list[Part]] = {objective.name: [] for objective in config.objectives}
    scans = []
    optimizer.zero_grad()
    for _ in range(config.accumulation):
        part = next(examples)
        taught = key_pass(learner, part)
        for branches in query_passes(learner, part, taught, schedule):
            losses = {name: branch.loss / config.accumulation for name, branch in branches.items()}
            if apart:
                backward_by_branch(losses, shared, by_branch)
            else:
                torch.autograd.backward([*losses.values()])
            for name, branch in branches.items():
                parts[name].append(Part(examples=part, taught=taught.get(name), branch=branch.detached()))
        scans += [scan for batch in part.batches for view in batch.scan_ids for scan in view]

    figures = collect_gradients(learner, shared, by_branch, measured=measured)
    check_gradients(dict(learner.query.named_children()))
    total = nn.utils.get_total_norm([one.grad for one in learner.query.parameters() if one.grad is not None])
    if isinstance(optimizer, BranchAdamW):
        optimizer.take(by_branch)
    nn.utils.clip_grads_with_norm_(trained_parameters(optimizer), config.gradient_clip, total)
    figures["gradient/total"] = total
    results = [part.branch for of_branch in parts.values() for part in of_branch]
    finite = torch.stack([total, *(branch.loss for branch in results)]).isfinite().all()
    spoilt, stopping = distributed.any_rank(~finite, stop_requested(), device=finite.device)
    if not spoilt:
        optimizer.step()
        if learner.key is not None:
            move_towards(learner.key, learner.query, schedule["momentum"])
        remember(learner, parts, figures)
    return Update(
        finite=not spoilt,
        stopping=stopping,
        figures=[figures, *(branch.figures for branch in results)],
        scans=scans,
    )


def collect_gradients(
    learner: Learner, shared: list[nn.Parameter], by_branch: Mapping[str, Gradients], *, measured: bool
) -> dict[str, Tensor]:
    """Average gradients over ranks; measure, balance and add up those kept by branch, if any. Returns the figures."""
    distributed.average_([one.grad for one in learner.query.parameters() if one.grad is not None])
    if not by_branch:
        return {}
    for gradients in by_branch.values():
        distributed.average_([one for one in gradients if one is not None])
    figures = measure(by_branch)
    if measured:
        figures |= measure_by_depth(by_branch, parameters_by_depth(learner.query.encoder))
    heads = {one.name: learner.query.get_submodule(one.head_name) for one in learner.config.objectives}
    figures |= scale(by_branch, heads, balancing_factors(learner, by_branch, heads, figures))
    sum_into(by_branch, shared)
    return figures


def balancing_factors(
    learner: Learner, by_branch: Mapping[str, Gradients], heads: Mapping[str, nn.Module], figures: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """By what the recipe scales the gradients of branches, for those that it scales."""
    config, numbers = learner.config, learner.config.branch_numbers
    if config.balance == "clip":
        return clip_factors(by_branch, heads, numbers)
    if config.balance == "equal_norms":
        norms = averaged_norms(learner, figures)
        return dict(zip(numbers, norm_weights(norms, norms.new_tensor([*numbers.values()]))))
    ratios = {one.name: one.max_gradient_ratio for one in config.objectives if one.max_gradient_ratio is not None}
    return ratio_factors(by_branch, ratios)


def averaged_norms(learner: Learner, figures: Mapping[str, Tensor]) -> Tensor:
    """The moving averages of the branches' norms, this step's included."""
    norms = [figures[f"{PREFIX}{objective.name}"].to(learner.branch_norms) for objective in learner.config.objectives]
    return moving_norms(learner.branch_norms, torch.stack(norms))


@torch.no_grad()
def remember(learner: Learner, parts: Mapping[str, list[Part]], figures: Mapping[str, Tensor]) -> None:
    """Let every objective update its state, and take the step's norms into their averages, if there are any."""
    for objective in learner.config.objectives:
        objective.remember(learner.state_of(objective), parts[objective.name])
    if learner.config.balance == "equal_norms":
        learner.branch_norms.copy_(averaged_norms(learner, figures))
