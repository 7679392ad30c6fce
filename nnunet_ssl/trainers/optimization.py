"""Optimizer and learning rates of fine-tuning: encoder and decoder each have their own pace."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import distributed, nn

from nnunet_ssl.decay import decay_groups
from nnunet_ssl.errors import UserError
from nnunet_ssl.schedules import warmup_cosine

# arXiv 2511.11311, fine-tuning recipe
WARMUP_SHARE = 0.05
DECODER_DECAY = 1e-2
ENCODER_DECAY = 1e-3
FLOOR_OF_PEAK = 0.02  # a peak of 5e-4 falls to 1e-5


def build_optimizer(network: nn.Module, lr: float, encoder_lr: float) -> torch.optim.AdamW:
    """Return AdamW over the decoder's groups first, then the encoder's; each group knows its `peak_lr` and `part`."""
    encoder = {id(parameter) for parameter in network.encoder.parameters()}
    named = list(network.named_parameters())
    groups = []
    for part, peak, decay in (("decoder", lr, DECODER_DECAY), ("encoder", encoder_lr, ENCODER_DECAY)):
        own = [(name, p) for name, p in named if (id(p) in encoder) == (part == "encoder")]
        groups += [{**group, "peak_lr": peak, "part": part} for group in decay_groups(own, decay)]
    return torch.optim.AdamW(groups, lr=lr)


class StepSchedule:
    """Warm-up and cosine for each part, set before every step; the encoder's begins when it is unfrozen.

    nnU-Net asks its scheduler once an epoch, through :meth:`step`; the trainer asks :meth:`set_step` before each step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, steps: int, epoch_steps: int, freeze_steps: int) -> None:
        self.optimizer = optimizer
        self.steps = steps
        self.epoch_steps = epoch_steps
        self.freeze_steps = freeze_steps

    def step(self, epoch: int) -> None:
        self.set_step(epoch * self.epoch_steps)

    def set_step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            start = self.freeze_steps if group["part"] == "encoder" else 0
            group["lr"] = self._rate(step - start, self.steps - start, group["peak_lr"]) if step >= start else 0.0

    def _rate(self, step: int, steps: int, peak: float) -> float:
        warmup = round(WARMUP_SHARE * self.steps)
        return warmup_cosine(step, steps=steps, warmup=warmup, peak=peak, floor=FLOOR_OF_PEAK * peak)


def refuse_lost_epoch(losses: Sequence[float], epoch: int, is_ddp: bool) -> None:
    """End a training that nothing can be learnt in any more, before nnU-Net writes a checkpoint of the epoch.

    Args:
        losses: of the epoch's steps, on this rank.
        is_ddp: other ranks have losses of their own; all must call this.

    Raises:
        UserError: none of the losses, on any rank, is finite.
    """
    ranks = [losses]
    if is_ddp:
        ranks = [[] for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(ranks, losses)
    if not any(math.isfinite(loss) for rank in ranks for loss in rank):
        raise UserError(
            f"The loss was not finite in any step of epoch {epoch}, so the training ends here; the checkpoint of the "
            "epoch before it, if there is one, is kept. Look for images with numbers that are not finite, or train "
            "slower: nnssl_settings=lr=..."
        )
