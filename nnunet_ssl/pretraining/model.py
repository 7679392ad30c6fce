"""The networks of a recipe: an encoder with heads, its moving average, the queue. What a checkpoint has to hold."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from nnunet_ssl.architectures.compiling import compile_parts
from nnunet_ssl.architectures.fpn import FPNDecoder
from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.pretraining.config import PretrainingConfig
from nnunet_ssl.pretraining.momentum import Queue
from nnunet_ssl.pretraining.objectives.contrastive import ProjectionHead
from nnunet_ssl.pretraining.objectives.tokens import TokenHead

Result = TypeVar("Result")


@functools.cache
def gpu_has_bf16() -> bool:
    """Whether the GPU computes in bfloat16. V100 and T4 only emulate it, which takes longer than float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def in_bf16(method: Callable[..., Result]) -> Callable[..., Result]:
    """Compute in bfloat16 what bears it, where the network's device can and its recipe allows; float32 elsewhere."""

    @functools.wraps(method)
    def run(network: Network, *inputs) -> Result:
        device = next(network.parameters()).device
        usable = network.bf16 and device.type == "cuda" and gpu_has_bf16()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=usable):
            return method(network, *inputs)

    return run


class Network(nn.Module):
    """An encoder and the heads that a recipe needs; a head that it does not need is None."""

    def __init__(self, config: PretrainingConfig) -> None:
        super().__init__()
        contrastive, masked, tokens = config.contrastive, config.masked, config.masked.tokens
        self.encoder = build_encoder({**config.architecture(), "checkpointing": config.checkpointing})
        channels = self.encoder.channels
        self.projection = self.decoder = self.token_head = None
        if config.has_contrastive:
            self.projection = ProjectionHead(channels[-1], contrastive.hidden, contrastive.dim)
        if masked.target == "voxels":
            self.decoder = FPNDecoder(channels, 1, width=masked.width, stride=self.encoder.strides[0])
        if masked.target == "tokens":
            self.token_head = TokenHead(channels[tokens.level], tokens.hidden, tokens.bottleneck, tokens.prototypes)
        self.token_level = tokens.level
        self.bf16 = config.bf16

    @in_bf16
    def encode(self, views: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Map (B, 1, X, Y, Z), with the cells of `mask` hidden, to the encoder's maps, finest first."""
        return self.encoder(views, mask)

    @in_bf16
    def project(self, maps: Sequence[Tensor]) -> Tensor:
        """Map the bottleneck to queries or keys, (B, D) on the unit sphere."""
        return self.projection(maps[-1])

    @in_bf16
    def reconstruct(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Map the maps to intensities (B, 1, *size)."""
        return self.decoder(maps, size)

    @in_bf16
    def score_tokens(self, maps: Sequence[Tensor]) -> Tensor:
        """Score the tokens of one map for the prototypes, (B, N, K)."""
        return self.token_head(maps[self.token_level])


class Learner(nn.Module):
    """The query network, which learns; the key network, its moving average; the queue; the mean of token scores.

    Args:
        config: the recipe. Weights are drawn from its seed, whatever has been drawn before.
    """

    def __init__(self, config: PretrainingConfig) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.query = Network(config)
        self.key = self.queue = None
        if config.needs_keys:
            self.key = copy.deepcopy(self.query).requires_grad_(False)
            self.key.decoder = None
        if config.has_contrastive:
            self.queue = Queue(config.queue_size, config.contrastive.dim)
        if config.masked.target == "tokens":
            self.register_buffer("centre", torch.zeros(config.masked.tokens.prototypes))
        if config.compile:
            self._compile()

    def _compile(self) -> None:
        """Let torch.compile have the encoders, which it compiles when they are first called."""
        # With a shared pass, a measured step goes backward twice through one graph, whose first time must not reuse its
        # memory.
        torch._functorch.config.donated_buffer = not self.config.shared_pass
        for network in filter(None, (self.query, self.key)):
            compile_parts(network.encoder)
