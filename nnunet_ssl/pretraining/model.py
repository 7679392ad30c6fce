"""The networks of a recipe: an encoder with heads, its moving average, and states. What a checkpoint has to hold."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from nnunet_ssl.architectures.backbones.base import Encoder
from nnunet_ssl.architectures.compiling import compile_parts, compiler_serves
from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.devices import computes_in_bf16
from nnunet_ssl.pretraining.config import PretrainingConfig
from nnunet_ssl.pretraining.objectives.base import Objective

Result = TypeVar("Result")
Inputs = ParamSpec("Inputs")
CPU = torch.device("cpu")


def in_bf16(method: Callable[Concatenate[Network, Inputs], Result]) -> Callable[Concatenate[Network, Inputs], Result]:
    """Compute in bfloat16 what bears it, where the network's device can and its recipe allows; float32 elsewhere."""

    @functools.wraps(method)
    def run(network: Network, /, *inputs: Inputs.args, **named: Inputs.kwargs) -> Result:
        device = next(network.parameters()).device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=network.bf16 and computes_in_bf16(device)):
            return method(network, *inputs, **named)

    return run


class Network(nn.Module):
    """An encoder and the heads of a recipe's objectives, each under the name that its objective gives it."""

    def __init__(self, config: PretrainingConfig) -> None:
        super().__init__()
        encoder = build_encoder({**config.architecture(), "checkpointing": config.checkpointing})
        if not isinstance(encoder, Encoder):
            raise TypeError(f"{type(encoder).__name__} is no encoder, which has channels, strides and parts().")
        if encoder.strides[-1] != config.stride:
            raise ValueError(
                f"Masks have cells of {config.stride} voxels, for each of the {config.maps} maps is to halve the grid, "
                f"but the strides of {type(encoder).__name__} are {encoder.strides}."
            )
        self.encoder = encoder
        for objective in config.objectives:
            self.add_module(objective.head_name, objective.build_head(encoder))
        self.bf16 = config.bf16

    @in_bf16
    def encode(self, views: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Map (B, 1, X, Y, Z), with the cells of `mask` hidden, to the encoder's maps, finest first."""
        return self.encoder(views, mask)

    @in_bf16
    def head(self, name: str, *inputs: Any) -> Tensor:
        """Call the head of that name."""
        return self.get_submodule(name)(*inputs)


class Learner(nn.Module):
    """The query network, which learns; the key network, its moving average; the states of the objectives.

    Where the branches' gradients are weighted to equal norms, ``branch_norms`` are the moving averages of these, one
    for each objective.

    Args:
        config: the recipe. Weights are drawn from its seed, whatever has been drawn before.
        device: where everything goes; drawn on the CPU, weights are the same everywhere.
    """

    branch_norms: Tensor

    def __init__(self, config: PretrainingConfig, device: torch.device = CPU) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.query = Network(config)
        self.key = None
        if config.needs_keys:
            self.key = copy.deepcopy(self.query).requires_grad_(False)
        for objective in config.objectives:
            if self.key is not None and not objective.needs_keys:
                delattr(self.key, objective.head_name)
            if objective.state_name is not None:
                self.add_module(objective.state_name, objective.build_state())
        if config.balance == "equal_norms":
            self.register_buffer("branch_norms", torch.zeros(len(config.objectives)))
        self.to(device)
        self.compiles = compiler_serves(device) if config.compile == "auto" else config.compile
        if self.compiles:
            self._compile()

    def state_of(self, objective: Objective) -> nn.Module | None:
        """What changes over the training beside the networks, for one objective."""
        return None if objective.state_name is None else self.get_submodule(objective.state_name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take checkpoints of version 0.1.0, too, which kept the teacher's mean score as "centre"."""
        if f"{prefix}centre" in state_dict:
            state_dict[f"{prefix}centre.mean"] = state_dict.pop(f"{prefix}centre")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _compile(self) -> None:
        """Let torch.compile have the encoders, which it compiles when they are first called."""
        # Where objectives share a pass, a measured step goes backward through one graph for each of them, and none but
        # the last may reuse its memory.
        torch._functorch.config.donated_buffer = all(len(objectives) == 1 for objectives in self.config.passes)
        for network in filter(None, (self.query, self.key)):
            compile_parts(network.encoder)
