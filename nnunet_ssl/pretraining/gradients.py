"""The gradients that each branch sends into the shared encoder: kept apart, measured, balanced, put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

Gradients = list[Tensor | None]
"""One per parameter; None where a branch does not use the parameter."""


def backward(losses: Mapping[str, Tensor], shared: Sequence[nn.Parameter], apart: dict[str, Gradients] | None) -> None:
    """Run the backward pass of losses that may share a graph.

    Args:
        losses: by branch.
        shared: the parameters whose gradients are wanted apart.
        apart: None adds all gradients into ``.grad``; a dictionary receives, added to what it holds, the gradients of
            `shared` by branch, and leaves their ``.grad`` at None.
    """
    if apart is None:
        sum(losses.values()).backward()
        return
    for place, (branch, loss) in enumerate(losses.items(), start=1):
        loss.backward(retain_graph=place < len(losses))
        taken = [parameter.grad for parameter in shared]
        for parameter in shared:
            parameter.grad = None
        apart[branch] = added(apart[branch], taken) if branch in apart else taken


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


def measure(apart: Mapping[str, Gradients]) -> dict[str, Tensor]:
    """The norm of each branch's gradient and, for two branches, their cosine."""
    figures = {f"gradient/{branch}": norm(gradients) for branch, gradients in apart.items()}
    if len(apart) == 2:
        figures["gradient/cosine"] = cosine(*apart.values())
    return figures


def balance(apart: Mapping[str, Gradients], head: Iterable[nn.Parameter], max_ratio: float) -> Tensor:
    """Scale the contrastive branch down, in place, to at most `max_ratio` times the masked one's norm on the encoder.

    Args:
        apart: the gradients of "contrastive" and "masked" on the encoder.
        head: the parameters that the contrastive branch has for itself. Their gradients are scaled alike: otherwise
            they would fill the gradient-norm clip, which shrinks the masked branch.
        max_ratio: of the norms.

    Returns:
        The factor, at most 1.
    """
    limit = max_ratio * norm(apart["masked"])
    factor = (limit / norm(apart["contrastive"]).clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1.0)
    torch._foreach_mul_([one for one in apart["contrastive"] if one is not None], factor)
    torch._foreach_mul_([parameter.grad for parameter in head], factor)
    return factor


def put_together(apart: Mapping[str, Gradients], shared: Sequence[nn.Parameter]) -> None:
    """Set the ``.grad`` of `shared` to the sum over branches."""
    total: Gradients = [None] * len(shared)
    for gradients in apart.values():
        total = added(total, gradients)
    for parameter, gradient in zip(shared, total):
        parameter.grad = gradient
