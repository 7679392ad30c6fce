"""AdamW with its decay groups, and the numbers that change over a pre-training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nnunet_ssl.decay import decay_groups
from nnunet_ssl.pretraining.config import PretrainingConfig
from nnunet_ssl.schedules import warmup_cosine


def build_optimizer(network: nn.Module, config: PretrainingConfig) -> torch.optim.AdamW:
    """AdamW in which biases, norms, position biases and the mask token do not decay; one fused update on a GPU."""
    trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    groups = decay_groups(trained, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=next(network.parameters()).is_cuda)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a checkpoint's moments and step counts; weight decay and the kind of update stay as `optimizer` was built.

    They enter the state before it is loaded, because where the step counts lie depends on `fused`.
    """
    groups = [
        {**saved, "weight_decay": fresh["weight_decay"], "fused": fresh["fused"]}
        for saved, fresh in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


def schedules(step: int, config: PretrainingConfig) -> dict[str, float]:
    """The numbers that `step` uses: learning_rate, momentum if there is a key network, and the objectives' own."""
    learning_rate = warmup_cosine(
        step,
        steps=config.steps,
        warmup=int(config.warmup * config.steps),
        peak=config.learning_rate,
        floor=config.minimum_learning_rate,
    )
    ramps = {"momentum": config.momentum} if config.needs_keys else {}
    for objective in config.objectives:
        ramps |= objective.ramps()
    return {"learning_rate": learning_rate, **{name: one.at(step, config.steps) for name, one in ramps.items()}}
