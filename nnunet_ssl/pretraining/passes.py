"""One step's forward computation: the key network's pass, then the query network's, and the objectives' losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.objectives.base import Branch, Examples, Objective, Pass


@torch.no_grad()
def key_pass(learner: Learner, examples: Examples) -> dict[str, Any]:
    """Let the key network look at whole views; return what it teaches each branch that wants to know."""
    if learner.key is None:
        return {}
    asking = [objective for objective in learner.config.objectives if objective.needs_keys]
    everything = any(objective.teaches_unpaired for objective in asking)
    maps = learner.key.encode(examples.views if everything else examples.paired_views)
    return {objective.name: objective.teach(learner.key, maps, examples) for objective in asking}


def query_passes(
    learner: Learner, examples: Examples, taught: Mapping[str, Any], schedule: Mapping[str, float]
) -> Iterator[dict[str, Branch]]:
    """Yield the branches pass by pass: of whole views, then of views with hidden cells.

    Whoever runs the backward pass before asking for the next one holds a single graph in memory at a time. With
    `shared_pass` there is one pass: objectives that would look at whole views, too, get views with hidden cells.
    """

    def branches(objectives: Sequence[Objective], maps: Sequence[Tensor]) -> dict[str, Branch]:
        return {
            one.name: one.branch(
                learner.query,
                Pass(
                    maps=maps,
                    examples=examples,
                    taught=taught.get(one.name),
                    state=learner.state_of(one),
                    schedule=schedule,
                ),
            )
            for one in objectives
        }

    for objectives in learner.config.passes:
        if any(one.masked for one in objectives):
            yield branches(objectives, learner.query.encode(examples.views, examples.mask))
        else:
            yield branches(objectives, learner.query.encode(examples.paired_views))
