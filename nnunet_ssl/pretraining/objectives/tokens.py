"""Masked tokens by self-distillation: say which prototypes the key network sees where the query network sees nothing.

iBOT (arXiv 2111.07832), with one change: the key network looks at the *other* view of a pair. With two modalities of a
session as views, a token's target is then what both modalities have in common at that place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


class TokenHead(nn.Module):
    """Each token of a feature map to its scores for the prototypes: cosines, through a three-layer bottleneck."""

    def __init__(self, channels: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        self.prototypes.parametrizations.weight.original0.data.fill_(1.0)
        self.prototypes.parametrizations.weight.original0.requires_grad = False

    def forward(self, level: Tensor) -> Tensor:
        """Map (B, channels, x, y, z) to (B, x * y * z, prototypes), float32 even under autocast.

        Near 1 bfloat16 knows cosines in steps of 0.004, which a temperature of 0.04 would turn into steps of 0.1.
        """
        tokens = self.layers(level.flatten(2).transpose(1, 2))
        with torch.autocast(tokens.device.type, enabled=False):
            return self.prototypes(F.normalize(tokens.float(), dim=-1))


@dataclass(frozen=True)
class Distillation:
    """The loss with what one wants to know about it."""

    loss: Tensor  # scalar
    perplexity: Tensor  # scalar: prototypes in use, 1 = collapsed, all of them = evenly used
    centre: Tensor  # (K,) mean score of the teacher in this batch, for the running mean


def distillation(
    student: Tensor,
    teacher: Tensor,
    hidden: Tensor,
    centre: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Distillation:
    """Cross-entropy between the teacher's and the student's distribution over prototypes, on hidden tokens.

    Args:
        student: (B, N, K) scores of the masked views.
        teacher: (B, N, K) scores of whole views at the same places, without gradient.
        hidden: (B, N) bool, True where the student's token is hidden; at least one in each view.
        centre: (K,) subtracted from the teacher's scores.
        student_temperature: the larger it is, the flatter the student's distribution.
        teacher_temperature: below the student's, so that targets are sharper than predictions.
    """
    target = ((teacher.float() - centre) / teacher_temperature).softmax(dim=-1)
    surprise = -(target * (student.float() / student_temperature).log_softmax(dim=-1)).sum(dim=-1)
    loss = ((surprise * hidden).sum(dim=1) / hidden.sum(dim=1)).mean()
    with torch.no_grad():
        usage = target.mean(dim=(0, 1))
        perplexity = torch.special.entr(usage).sum().exp()
    return Distillation(loss, perplexity, teacher.float().mean(dim=(0, 1)))
