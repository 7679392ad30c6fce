"""Optimizers of fine-tuning, in which encoder and decoder each have their own pace."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import distributed, nn

from nnunet_ssl.decay import decay_groups
from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.freezing import encoder_of
from nnunet_ssl.trainers.schedules import Schedule

# arXiv 2511.11311, fine-tuning recipe
DECODER_DECAY = 1e-2
ENCODER_DECAY = 1e-3
# PretrainedTrainer_Primus of MIC-DKFZ/nnUNet
PRIMUS_DECAY = 5e-2
PRIMUS_BETAS = (0.9, 0.98)
# nnU-Net's own
SGD_DECAY = 3e-5
SGD_MOMENTUM = 0.99

GRADIENT_CLIP = {"adamw": 2.0, "sgd": 12.0, "adamw_primus": 1.0}
"""Norm to which all gradients together are clipped: arXiv 2511.11311's with AdamW, nnU-Net's with SGD, Primus' own."""


def build_optimizer(network: nn.Module, lr: float, encoder_lr: float, name: str = "adamw") -> torch.optim.Optimizer:
    """Return an optimizer over the decoder's groups first, then the encoder's; each knows its `peak_lr` and `part`.

    Whatever is the encoder's is not the decoder's, although nnU-Net's U-Nets hold the encoder inside the decoder too.

    Args:
        name: ``adamw``; ``sgd``: nnU-Net's, with Nesterov's momentum; ``adamw_primus``: that of Primus' own trainers.
            The last two have one weight decay on everything.
    """
    encoder = {id(parameter) for parameter in encoder_of(network).parameters()}
    named = list(network.named_parameters())
    groups = []
    for part, peak, decay in (("decoder", lr, DECODER_DECAY), ("encoder", encoder_lr, ENCODER_DECAY)):
        own = [(key, p) for key, p in named if (id(p) in encoder) == (part == "encoder")]
        split = decay_groups(own, decay) if name == "adamw" else [{"params": [p for _, p in own]}]
        groups += [{**group, "peak_lr": peak, "part": part} for group in split]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    if name == "adamw_primus":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=PRIMUS_DECAY, betas=PRIMUS_BETAS)
    return torch.optim.SGD(groups, lr=lr, weight_decay=SGD_DECAY, momentum=SGD_MOMENTUM, nesterov=True)


class StepSchedule:
    """Sets the learning rates of a schedule before every step.

    nnU-Net asks its scheduler once an epoch, through :meth:`step`; the trainer asks :meth:`set_step` before each step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule, epoch_steps: int) -> None:
        self.optimizer = optimizer
        self.schedule = schedule
        self.epoch_steps = epoch_steps

    def step(self, epoch: int) -> None:
        self.set_step(epoch * self.epoch_steps)

    def set_step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(group["part"], step, group["peak_lr"])


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
