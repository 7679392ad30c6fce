"""The gradients that each branch sends into the shared encoder: kept by branch, measured, balanced, summed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

PREFIX, COSINE, BALANCE = "gradient/", "gradient/cosine", "gradient/balance"
"""Columns of a run's table: the norm of each branch's gradient by its name, and what is measured of them together."""

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
    """The Euclidean norm over all parameters."""
    return torch.stack(torch._foreach_norm([one for one in gradients if one is not None])).norm()


def cosine(first: Gradients, second: Gradients) -> Tensor:
    """The cosine of the angle between two gradients; a parameter that one of them does not use counts as zero there."""
    both = [(a, b) for a, b in zip(first, second) if a is not None and b is not None]
    product = torch.stack([(a * b).sum() for a, b in both]).sum()
    return product / (norm(first) * norm(second)).clamp(min=torch.finfo(torch.float32).tiny)


def branch_names(columns: Iterable[str]) -> list[str]:
    """The branches whose gradients a run's table holds."""
    names = [column.removeprefix(PREFIX) for column in columns if column.startswith(PREFIX)]
    return [name for name in names if name not in ("total", "cosine", "balance") and "/" not in name]


def balance_columns(branch: str) -> list[str]:
    """Where the factor of a branch stands; that of the contrastive branch alone bears no name, since 0.1.0."""
    return [f"{BALANCE}/{branch}"] + [BALANCE] * (branch == "contrastive")


def measure(by_branch: Mapping[str, Gradients]) -> dict[str, Tensor]:
    """The norm of each branch's gradient and the cosine of each pair of branches.

    The cosine of two branches is ``gradient/cosine``; of more, ``gradient/cosine/a-b``.
    """
    figures = {f"{PREFIX}{branch}": norm(gradients) for branch, gradients in by_branch.items()}
    for (first, one), (second, other) in itertools.combinations(by_branch.items(), 2):
        figures[COSINE if len(by_branch) == 2 else f"{COSINE}/{first}-{second}"] = cosine(one, other)
    return figures


def balance(
    by_branch: Mapping[str, Gradients], heads: Mapping[str, nn.Module], max_ratio: Mapping[str, float]
) -> dict[str, Tensor]:
    """Scale gradients down, in place, to at most so many times the norm of all other branches' together.

    Args:
        by_branch: the branches' gradients on the encoder.
        heads: what a branch has for itself. Its gradients are scaled alike: otherwise they would fill the gradient-norm
            clip, which shrinks the other branches.
        max_ratio: of the norms, for each branch that is limited; all limits refer to the gradients as they came.

    Returns:
        The factors, each at most 1, by :func:`balance_columns`.
    """
    tiny = torch.finfo(torch.float32).tiny
    factors = {}
    for branch, ratio in max_ratio.items():
        others: Gradients = [None] * len(by_branch[branch])
        for gradients in (gradients for name, gradients in by_branch.items() if name != branch):
            others = added(others, gradients)
        factors[branch] = (ratio * norm(others) / norm(by_branch[branch]).clamp(min=tiny)).clamp(max=1.0)
    for branch, factor in factors.items():
        scaled = [*by_branch[branch], *(parameter.grad for parameter in heads[branch].parameters())]
        torch._foreach_mul_([one for one in scaled if one is not None], factor)
    return {balance_columns(branch)[-1 if len(factors) == 1 else 0]: factor for branch, factor in factors.items()}


def sum_into(by_branch: Mapping[str, Gradients], shared: Sequence[nn.Parameter]) -> None:
    """Set the ``.grad`` of `shared` to the sum over branches."""
    total: Gradients = [None] * len(shared)
    for gradients in by_branch.values():
        total = added(total, gradients)
    for parameter, gradient in zip(shared, total):
        parameter.grad = gradient
