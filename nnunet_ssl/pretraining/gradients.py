"""The gradients that each branch sends into the shared encoder: kept by branch, measured, balanced, summed.

What balances them is a setting, :data:`Balance`. Three kinds scale the gradients of a branch, those on its own head
alike, by a factor: :func:`ratio_factors`, :func:`clip_factors`, :func:`norm_weights`. The fourth keeps them apart up to
the update, :class:`nnunet_ssl.pretraining.optimization.BranchAdamW`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

PREFIX, COSINE, BALANCE = "gradient/", "gradient/cosine", "gradient/balance"
"""Columns of a run's table: the norm of each branch's gradient by its name, and what is measured of them together."""

DEPTH = "gradient/depth/"
"""Columns of the same for each depth of the encoder: ``gradient/depth/<place>_<name>/contrastive`` and ``.../cosine``.
Places count from 0, the finest; a table's columns are sorted, and names are not in their order then."""

Balance = Literal["sum", "clip", "equal_norms", "learning_rates"]
"""What becomes of the branches' gradients: they are summed, clipped by branch, weighted to equal norms, or each moves
the encoder with a learning rate and moments of its own."""

NORM_MEMORY = 0.9
"""Of the moving averages behind :func:`norm_weights`: they look back over about ten steps, enough to even out the
scatter of single steps and few beside the warm-up of the losses' weights."""

TINY = torch.finfo(torch.float32).tiny

Gradients = list[Tensor | None]
"""One per parameter; None where a branch does not use the parameter."""


def backward_by_branch(
    losses: Mapping[str, Tensor], shared: Sequence[nn.Parameter], gradients: dict[str, Gradients]
) -> None:
    """Run the backward pass of losses that may share a graph, and keep what each of them sends into `shared`.

    Args:
        losses: by branch.
        shared: parameters, whose ``.grad`` is None afterwards. All others' is the sum over branches, as ever.
        gradients: of `shared`, by branch; added to what it holds.
    """
    for place, (branch, loss) in enumerate(losses.items(), start=1):
        loss.backward(retain_graph=place < len(losses))
        taken = [parameter.grad for parameter in shared]
        for parameter in shared:
            parameter.grad = None
        gradients[branch] = added(gradients[branch], taken) if branch in gradients else taken


def added(first: Gradients, second: Gradients) -> Gradients:
    return [a if b is None else b if a is None else a + b for a, b in zip(first, second)]


def norm(gradients: Gradients) -> Tensor:
    """The Euclidean norm over all parameters; 0 where there is no gradient at all."""
    present = [one for one in gradients if one is not None]
    return torch.stack(torch._foreach_norm(present)).norm() if present else torch.zeros(())


def cosine(first: Gradients, second: Gradients) -> Tensor:
    """The cosine of the angle between two gradients; a parameter that one of them does not use counts as zero there."""
    both = [(a, b) for a, b in zip(first, second) if a is not None and b is not None]
    product = torch.stack([(a * b).sum() for a, b in both]).sum()
    return product / (norm(first) * norm(second)).clamp(min=TINY)


def branch_names(columns: Iterable[str]) -> list[str]:
    """The branches whose gradients a run's table holds."""
    names = [column.removeprefix(PREFIX) for column in columns if column.startswith(PREFIX)]
    return [name for name in names if name not in ("total", "cosine", "balance") and "/" not in name]


def depth_prefixes(columns: Iterable[str]) -> dict[str, str]:
    """By the name of each depth whose gradients a run's table holds, finest first: what its columns begin with."""
    found = {column.removeprefix(DEPTH).split("/")[0] for column in columns if column.startswith(DEPTH)}
    places = sorted((int(place), name) for place, _, name in (one.partition("_") for one in found) if place.isdecimal())
    return {name: f"{DEPTH}{place}_{name}/" for place, name in places}


def balance_columns(branch: str) -> list[str]:
    """Where the factor of a branch stands; that of the contrastive branch alone bears no name, since 0.1.0."""
    return [f"{BALANCE}/{branch}"] + [BALANCE] * (branch == "contrastive")


def measure(by_branch: Mapping[str, Gradients]) -> dict[str, Tensor]:
    """The norm of each branch's gradient and the cosine of each pair of branches that have a parameter in common.

    The cosine of two branches is ``gradient/cosine``; of more, ``gradient/cosine/a-b``.
    """
    figures = {f"{PREFIX}{branch}": norm(gradients) for branch, gradients in by_branch.items()}
    for (first, one), (second, other) in itertools.combinations(by_branch.items(), 2):
        if any(a is not None and b is not None for a, b in zip(one, other)):
            figures[COSINE if len(by_branch) == 2 else f"{COSINE}/{first}-{second}"] = cosine(one, other)
    return figures


def measure_by_depth(by_branch: Mapping[str, Gradients], depths: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Measure the same for each depth by itself.

    Args:
        by_branch: the branches' gradients on the encoder.
        depths: see :func:`nnunet_ssl.architectures.backbones.base.parameters_by_depth`.

    Returns:
        what :func:`measure` returns, with the prefix of :data:`DEPTH` in the place of :data:`PREFIX`. Squares of norms
        add up over depths to that on the whole encoder.
    """
    figures = {}
    for place, (depth, members) in enumerate(depths.items()):
        of_depth = {branch: [gradients[member] for member in members] for branch, gradients in by_branch.items()}
        for name, value in measure(of_depth).items():
            figures[f"{DEPTH}{place}_{depth}/{name.removeprefix(PREFIX)}"] = value
    return figures


def ratio_factors(by_branch: Mapping[str, Gradients], max_ratio: Mapping[str, float]) -> dict[str, Tensor]:
    """What holds the norm of a branch to at most so many times the norm of all other branches' sum.

    Args:
        by_branch: the branches' gradients on the encoder.
        max_ratio: of the norms, for each branch that is limited; all limits refer to the gradients as they came.

    Returns:
        factors, each at most 1, of the limited branches.
    """
    factors = {}
    for branch, ratio in max_ratio.items():
        others: Gradients = [None] * len(by_branch[branch])
        for gradients in (gradients for name, gradients in by_branch.items() if name != branch):
            others = added(others, gradients)
        factors[branch] = (ratio * norm(others) / norm(by_branch[branch]).clamp(min=TINY)).clamp(max=1.0)
    return factors


def clip_factors(
    by_branch: Mapping[str, Gradients], heads: Mapping[str, nn.Module], limits: Mapping[str, float]
) -> dict[str, Tensor]:
    """What clips each branch by itself: its gradient on the encoder and on its head, taken together, to `limits`.

    Clipping of norms as in Pascanu et al. 2013 (arXiv 1211.5063), branch by branch.

    Returns:
        factors, each at most 1, by branch.
    """
    return {
        branch: (limit / norm([*by_branch[branch], *_of(heads[branch])]).clamp(min=TINY)).clamp(max=1.0)
        for branch, limit in limits.items()
    }


def moving_norms(before: Tensor, norms: Tensor) -> Tensor:
    """Take a step's norms, one per branch, into their moving averages; an average of 0 has seen no gradient yet."""
    return torch.where(before > 0, torch.lerp(norms, before, NORM_MEMORY), norms)


def norm_weights(norms: Tensor, shares: Tensor) -> Tensor:
    """Weights of branches with which their norms are in the proportion of `shares`: all equal where those are.

    GradNorm (Chen et al. 2018, arXiv 1711.02257) descends on the weights of the losses until the gradients' norms on
    the last shared layer are equal up to a task's relative training rate to the power alpha. Here alpha is 0, so that
    the weights that it descends to can be written down, ``w_b = c * share_b / norm_b``; the norms are those on the
    whole encoder, and moving averages take the place of the small steps of its descent. As there, c is such that the
    weights add up to the number of branches.

    Args:
        norms: (branches,) moving averages of the norms of their gradients.
        shares: (branches,) positive.

    Returns:
        (branches,); 1 for a branch without gradient, which the others are weighted without.
    """
    learns = norms > 0
    least = torch.where(learns, norms, torch.inf).min()
    wanted = torch.where(learns, shares * (least / norms), 0)
    return torch.where(learns, learns.sum() * wanted / wanted.sum(), 1)


def scale(
    by_branch: Mapping[str, Gradients], heads: Mapping[str, nn.Module], factors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Scale the gradients of branches in place.

    Args:
        by_branch: the branches' gradients on the encoder.
        heads: what a branch has for itself. Its gradients are scaled alike: otherwise they would fill the gradient-norm
            clip, which shrinks the other branches.
        factors: of the branches that are to be scaled.

    Returns:
        The factors by :func:`balance_columns`.
    """
    for branch, factor in factors.items():
        torch._foreach_mul_([one for one in (*by_branch[branch], *_of(heads[branch])) if one is not None], factor)
    return {balance_columns(branch)[-1 if len(factors) == 1 else 0]: factor for branch, factor in factors.items()}


def sum_into(by_branch: Mapping[str, Gradients], shared: Sequence[nn.Parameter]) -> None:
    """Set the ``.grad`` of `shared` to the sum over branches."""
    total: Gradients = [None] * len(shared)
    for gradients in by_branch.values():
        total = added(total, gradients)
    for parameter, gradient in zip(shared, total):
        parameter.grad = gradient


def _of(module: nn.Module) -> Gradients:
    return [parameter.grad for parameter in module.parameters()]
