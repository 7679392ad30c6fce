"""InfoNCE against a queue in which only other subjects are negatives (MoCo v2, arXiv 2003.04297, symmetric)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EMPTY = -1
"""The subject of a queue's slot that holds no key yet."""


class ProjectionHead(nn.Module):
    """The bottleneck's average over space, through two linear layers, onto the unit sphere."""

    def __init__(self, channels: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, bottleneck: Tensor) -> Tensor:
        """Map (B, channels, x, y, z) to (B, dim), float32, rows of length one."""
        return F.normalize(self.layers(pooled(bottleneck)).float(), dim=1)


def pooled(bottleneck: Tensor) -> Tensor:
    """The embedding of a view: the average over space, (B, C, x, y, z) to (B, C)."""
    return bottleneck.mean(dim=(2, 3, 4))


@dataclass(frozen=True)
class InfoNCE:
    """The loss with what one wants to know about it; every entry a scalar tensor."""

    loss: Tensor
    accuracy: Tensor  # share of queries whose own key scores above every negative
    negatives: Tensor  # mean number of negatives of a query


def info_nce(
    queries: Tensor, keys: Tensor, subjects: Tensor, queue_keys: Tensor, queue_subjects: Tensor, temperature: float
) -> InfoNCE:
    """Tell the key of each query from the queue's keys of other subjects.

    -log(exp(q.k / T) / (exp(q.k / T) + sum over negatives n of exp(q.n / T))), averaged over queries. Slots of the
    query's own subject, in whatever session, and empty slots have no part in the sum. Without negatives the loss is 0.

    Args:
        queries: (B, D), on the unit sphere.
        keys: (B, D), on the unit sphere, without gradient.
        subjects: (B,) the subject of each query, a number >= 0.
        queue_keys: (Q, D).
        queue_subjects: (Q,), `EMPTY` where a slot holds no key.
        temperature: T.
    """
    positive = (queries * keys).sum(dim=1, keepdim=True)
    negative = queries @ queue_keys.T
    excluded = (queue_subjects[None, :] == subjects[:, None]) | (queue_subjects[None, :] == EMPTY)
    negative = negative.masked_fill(excluded, float("-inf"))
    logits = torch.cat([positive, negative], dim=1) / temperature
    loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
    with torch.no_grad():
        accuracy = (positive[:, 0] > negative.max(dim=1).values).float().mean()
        negatives = (~excluded).sum(dim=1).float().mean()
    return InfoNCE(loss, accuracy, negatives)


def symmetric_info_nce(
    queries: Tensor, keys: Tensor, subjects: Tensor, queue_keys: Tensor, queue_subjects: Tensor, temperature: float
) -> InfoNCE:
    """0.5 * (q1.k2 + q2.k1): each view's query is to find the other view's key.

    Args:
        queries: (2, B, D).
        keys: (2, B, D).
        subjects: (B,); for the others see :func:`info_nce`.
    """
    crossed = keys.flip(0).flatten(0, 1)
    return info_nce(queries.flatten(0, 1), crossed, subjects.repeat(2), queue_keys, queue_subjects, temperature)
