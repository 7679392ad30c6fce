"""AdamW with its decay groups, for all branches together or each apart, and the numbers that change over a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ssl.decay import decay_groups
from nnunet_ssl.pretraining.config import PretrainingConfig
from nnunet_ssl.pretraining.gradients import Gradients
from nnunet_ssl.pretraining.model import Network
from nnunet_ssl.schedules import warmup_cosine


class BranchAdamW(torch.optim.AdamW):
    """AdamW whose shared parameters are moved by each branch with moments and a learning rate of the branch's own.

    For each branch it holds a move of every shared parameter, zero between steps, on which AdamW does as ever with the
    gradients that :meth:`take` was given. A step decays the shared parameters once, by their own groups, and adds the
    moves of all branches. With one branch and factor 1 that is AdamW.

    Args:
        groups: of all parameters, the shared ones included, as AdamW takes them.
        shared: parameters.
        factors: by branch, of the learning rate.
        options: of AdamW.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        shared: Sequence[nn.Parameter],
        factors: Mapping[str, float],
        *,
        lr: float,
        **options: Any,
    ) -> None:
        self.shared: list[Tensor] = list(shared)
        self.moves = {branch: [torch.zeros_like(one, requires_grad=True) for one in shared] for branch in factors}
        of_branches = [
            {"params": moves, "weight_decay": 0.0, "lr": factors[branch] * lr, "factor": factors[branch]}
            for branch, moves in self.moves.items()
        ]
        super().__init__([*groups, *of_branches], lr=lr, **options)

    def take(self, by_branch: Mapping[str, Gradients]) -> None:
        """Let the next step be fed by each branch's gradients of the shared parameters, which have none themselves."""
        for parameter in self.shared:
            parameter.grad = None
        for branch, moves in self.moves.items():
            for move, gradient in zip(moves, by_branch[branch], strict=True):
                move.grad = gradient

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move everything that has a gradient, and the shared parameters by the sum of their moves."""
        shared = set(map(id, self.shared))
        for group in self.param_groups:
            if decayed := [one for one in group["params"] if id(one) in shared]:
                torch._foreach_mul_(decayed, 1 - group["lr"] * group["weight_decay"])
        super().step()
        for moves in self.moves.values():
            torch._foreach_add_(self.shared, moves)
            torch._foreach_zero_(moves)


def build_optimizer(network: Network, config: PretrainingConfig) -> torch.optim.AdamW:
    """AdamW in which biases, norms, position biases and the mask token do not decay; one fused update on a GPU."""
    trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    groups = decay_groups(trained, config.weight_decay)
    fused = next(network.parameters()).is_cuda
    if config.balance == "learning_rates":
        shared = list(network.encoder.parameters())
        return BranchAdamW(groups, shared, config.branch_numbers, lr=config.learning_rate, fused=fused)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused)


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What `optimizer` moves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group, by its factor where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = group.get("factor", 1.0) * learning_rate


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a checkpoint's moments and step counts; what settings say of the groups stays as `optimizer` was built.

    It enters the state before that is loaded, because where the step counts lie depends on `fused`.
    """
    groups = [
        {**saved, **{name: fresh[name] for name in ("weight_decay", "fused", "factor") if name in fresh}}
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
