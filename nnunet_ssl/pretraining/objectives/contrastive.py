"""InfoNCE against a queue in which only other subjects are negatives (MoCo v2, arXiv 2003.04297, symmetric)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_ssl.architectures.backbones.base import Encoder
from nnunet_ssl.architectures.networks import pooled
from nnunet_ssl.pretraining import distributed
from nnunet_ssl.pretraining.objectives.base import (
    Branch,
    EncoderWithHeads,
    Examples,
    Objective,
    Pairs,
    Part,
    Pass,
    Recipe,
)
from nnunet_ssl.pretraining.run.panels import BLUE, GREEN, Curve, Panel, both
from nnunet_ssl.representation import effective_rank, uniformity
from nnunet_ssl.schedules import Ramp
from nnunet_ssl.typed import ranged

EMPTY = -1
"""The subject of a queue's slot that holds no key yet."""

QUEUE_SAMPLE = 1024
"""Keys on which the queue's figures are taken: all of them would cost 40 ms more and say the same."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """The contrastive branch: MoCo v2 with a queue, where only other subjects are negatives."""

    pairs: Literal["mcl", "cl", "none"] = "none"  # two modalities of one session, two views of one scan, or no branch
    temperature: float = ranged(0.2, "positive")  # of InfoNCE: similarities are divided by it
    hidden: int = ranged(512, "at least 1")  # width of the projection head's hidden layer
    dim: int = ranged(128, "at least 1")  # of queries and keys
    weight: Ramp = ranged(Ramp(low=0.1, high=1.0, begin=0.05, until=0.10), "0 or more")  # of the loss; alone it is 1
    max_gradient_ratio: float | None = ranged(None, "positive")  # scale this branch's gradient on the encoder down to
    # at most so many times the norm of the others'


class Contrastive(Objective):
    """Each view's query is to find the other view's key among those of other subjects."""

    name = "contrastive"
    section = "contrastive"
    section_type = ContrastiveConfig
    head_name = "projection"
    state_name = "queue"
    needs_keys = True
    shapes = ("contrastive.pairs", "contrastive.hidden", "contrastive.dim", "queue_size")
    in_the_log = {"loss/contrastive": "contrastive {:.4f}", "contrastive/accuracy": "accuracy {:.2f}"}  # noqa: RUF012
    panels = (
        Panel("Contrastive loss (InfoNCE)", both("loss/contrastive", BLUE)),
        Panel("Contrastive loss / loss of guessing", both("contrastive/loss_over_guessing", BLUE), reference=1.0),
        Panel("Own key found before all negatives, share", both("contrastive/accuracy", BLUE), limits=(0, 1)),
        Panel(
            "Directions in use (effective rank)",
            (
                Curve("queue/effective_rank", "keys in the queue", BLUE),
                Curve("validation/effective_rank", "embeddings", GREEN),
            ),
            limits=(0, None),
        ),
    )
    citations = ("Chen et al. Improved baselines with momentum contrastive learning. arXiv 2003.04297.",)

    @classmethod
    def is_on(cls, config: Recipe) -> bool:
        return config.section("contrastive").pairs != "none"

    @property
    def pairs(self) -> Pairs:
        return self.settings.pairs

    @property
    def max_gradient_ratio(self) -> float | None:
        return self.settings.max_gradient_ratio

    def build_head(self, encoder: Encoder) -> ProjectionHead:
        return ProjectionHead(encoder.channels[-1], self.settings.hidden, self.settings.dim)

    def build_state(self) -> Queue:
        return Queue(self.config.queue_size, self.settings.dim)

    def ramps(self) -> dict[str, Ramp]:
        """A branch by itself has no weight: it would only scale the gradient."""
        return {"contrastive_weight": self.settings.weight} if len(self.config.objectives) > 1 else {}

    def teach(self, key: EncoderWithHeads, maps: Sequence[Tensor], examples: Examples) -> Tensor:
        """The keys of both views, (V, B, D)."""
        by_view = examples.batch.views.shape[:2]
        return key.head(self.head_name, maps[-1][: by_view.numel()]).unflatten(0, by_view)

    def branch(self, query: EncoderWithHeads, given: Pass) -> Branch:
        by_view = given.examples.batch.views.shape[:2]
        queries = query.head(self.head_name, given.maps[-1][: by_view.numel()])
        result = symmetric_info_nce(
            queries.unflatten(0, by_view),
            given.taught,
            given.examples.batch.subject,
            given.state.keys,
            given.state.subjects,
            self.settings.temperature,
        )
        figures = {
            "loss/contrastive": result.loss.detach(),
            "contrastive/accuracy": result.accuracy,
            "contrastive/negatives": result.negatives,
            "contrastive/loss_over_guessing": result.over_guessing,
        }
        return Branch(loss=given.schedule.get("contrastive_weight", 1.0) * result.loss, figures=figures)

    def remember(self, state: Queue, parts: Sequence[Part]) -> None:
        """Put the keys of all ranks into the queue."""
        batches = [part.examples.batch for part in parts]
        views = len(batches[0].views)
        state.enqueue(
            distributed.gather(torch.cat([part.taught for part in parts], dim=1), dim=1).flatten(0, 1),
            distributed.gather(torch.cat([batch.subject for batch in batches])).repeat(views),
            distributed.gather(torch.cat([batch.session for batch in batches])).repeat(views),
        )

    def forget_subjects(self, state: Queue) -> str:
        """Subjects would meet their own keys as negatives."""
        state.subjects.fill_(EMPTY)
        state.sessions.fill_(EMPTY)
        return "the queue begins empty"

    def state_figures(self, state: Queue) -> dict[str, float]:
        return queue_figures(state)


class Projection(nn.Module):
    """Features through two linear layers onto the unit sphere."""

    def __init__(self, channels: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, features: Tensor) -> Tensor:
        """Map (..., channels) to (..., dim), float32, of length one."""
        return F.normalize(self.layers(features).float(), dim=-1)


class ProjectionHead(Projection):
    """The projection of the bottleneck's average over space."""

    def forward(self, bottleneck: Tensor) -> Tensor:
        """Map (B, channels, x, y, z) to (B, dim), float32, rows of length one."""
        return super().forward(pooled(bottleneck))


@dataclass(frozen=True)
class InfoNCE:
    """The loss with what one wants to know about it; every entry a scalar tensor."""

    loss: Tensor
    accuracy: Tensor  # share of queries whose own key scores above every negative
    negatives: Tensor  # mean number of negatives of a query
    over_guessing: Tensor  # the loss over that of scores that are all equal, log(1 + negatives); 1 without negatives


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
    similarity = torch.cat([(queries * keys).sum(dim=1, keepdim=True), queries @ queue_keys.T], dim=1)
    excluded = (queue_subjects[None, :] == subjects[:, None]) | (queue_subjects[None, :] == EMPTY)
    first, all_count = torch.zeros_like(subjects, dtype=torch.long), torch.ones_like(subjects, dtype=torch.bool)
    return info_nce_of_candidates(similarity, first, F.pad(excluded, (1, 0), value=False), all_count, temperature)


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


def info_nce_of_candidates(
    similarity: Tensor, match: Tensor, excluded: Tensor, counted: Tensor, temperature: float
) -> InfoNCE:
    """Tell the match of each query from all other candidates; averaged over the queries that count.

    Args:
        similarity: (n, m) cosines of queries and candidates.
        match: (n,) long, the candidate that is each query's.
        excluded: (n, m) bool, what has no part in a query's sum; a match never is.
        counted: (n,) bool; if none is, the loss is 0.
        temperature: T.
    """
    excluded = excluded & counted[:, None]
    logits = similarity.masked_fill(excluded, float("-inf")) / temperature

    def mean(of_queries: Tensor) -> Tensor:
        return (of_queries * counted).sum() / counted.sum().clamp_min(1)

    loss = mean(F.cross_entropy(logits, match, reduction="none"))
    with torch.no_grad():
        best_negative = logits.scatter(1, match[:, None], float("-inf")).max(dim=1).values
        accuracy = mean(logits.gather(1, match[:, None])[:, 0] > best_negative)
        negatives = (~excluded).sum(dim=1) - 1
        guessing = mean(negatives.log1p())
        over_guessing = torch.where(guessing > 0, loss / guessing, torch.ones_like(loss))
    return InfoNCE(loss, accuracy, mean(negatives), over_guessing)


class Queue(nn.Module):
    """A ring of keys, each with its subject and session; buffers, so that a checkpoint holds them.

    Args:
        size: slots.
        dim: of a key.
    """

    keys: Tensor
    subjects: Tensor
    sessions: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("subjects", torch.full((size,), EMPTY))
        self.register_buffer("sessions", torch.full((size,), EMPTY))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def filled(self) -> Tensor:
        """The keys that the queue holds, (n, D)."""
        return self.keys[self.subjects != EMPTY]

    @torch.no_grad()
    def enqueue(self, keys: Tensor, subjects: Tensor, sessions: Tensor) -> None:
        """Overwrite the oldest slots; of more keys than slots the last ones stay. Nothing leaves the device.

        Args:
            keys: (n, D).
            subjects: (n,).
            sessions: (n,).
        """
        size = len(self.keys)
        keys, subjects, sessions = keys[-size:], subjects[-size:], sessions[-size:]
        slots = (self.position + torch.arange(len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, slots, keys.to(self.keys.dtype))
        self.subjects.index_copy_(0, slots, subjects)
        self.sessions.index_copy_(0, slots, sessions)
        self.position.copy_((self.position + len(keys)) % size)


def queue_figures(queue: Queue) -> dict[str, float]:
    """How far the queue's keys spread: near rank 1 and uniformity 0 the projections have collapsed."""
    keys = queue.filled()
    if len(keys) < 2:
        return {}
    sample = keys[:: math.ceil(len(keys) / QUEUE_SAMPLE)].cpu().numpy()
    return {"queue/effective_rank": effective_rank(sample), "queue/uniformity": uniformity(sample)}
