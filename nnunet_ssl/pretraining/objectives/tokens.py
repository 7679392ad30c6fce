"""Masked tokens by self-distillation: say which prototypes the key network sees where the query network sees nothing.

iBOT (arXiv 2111.07832), with one change: the key network looks at the *other* view of a pair. With two modalities of a
session as views, a token's target is then what both modalities have in common at that place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from nnunet_ssl.architectures.backbones.base import Encoder
from nnunet_ssl.architectures.masking import expand_mask
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining import distributed
from nnunet_ssl.pretraining.objectives.base import Branch, EncoderWithHeads, Examples, Objective, Part, Pass, Recipe
from nnunet_ssl.pretraining.run.panels import ORANGE, Panel, both
from nnunet_ssl.schedules import Ramp
from nnunet_ssl.typed import ranged


@dataclass(frozen=True, kw_only=True)
class TokenConfig:
    """Targets of ``masked.target: tokens``: the key network's view of hidden tokens (iBOT, arXiv 2111.07832)."""

    level: int = 3  # of the encoder's maps, 0 the finest: stride 16, where 96^3 has 216 tokens
    prototypes: int = ranged(4096, "at least 1")  # classes of the self-distillation
    hidden: int = ranged(1024, "at least 1")  # width of the head
    bottleneck: int = ranged(256, "at least 1")  # dimension in which tokens are compared with prototypes
    student_temperature: float = ranged(0.1, "positive")  # of the softmax over prototypes: the query network's
    teacher_temperature: Ramp = ranged(Ramp(low=0.04, high=0.07, until=0.10), "positive")  # and the key network's
    view: Literal["other", "own"] = "other"  # whose tokens are the target: the pair's other view's, or its own as in
    # iBOT
    centre_momentum: float = ranged(0.9, "between 0 and 1")  # of the running mean that keeps one prototype from taking
    # all tokens


class Tokens(Objective):
    """Tell the key network's tokens of the other view at the hidden places (of the same view, without pairs or if set
    so)."""

    name = "masked"
    section = "masked"
    section_type = TokenConfig
    head_name = "token_head"
    state_name = "centre"
    masked = True
    needs_keys = True
    teaches_unpaired = True
    shapes = ("masked.target", *(f"masked.tokens.{name}" for name in ("level", "prototypes", "hidden", "bottleneck")))
    in_the_log = {"loss/masked": "masked {:.4f}"}  # noqa: RUF012
    panels = (Panel("Prototypes in use (perplexity)", both("masked/prototypes_used", ORANGE), limits=(0, None)),)
    citations = ("Zhou et al. iBOT: image BERT pre-training with online tokenizer. arXiv 2111.07832.",)

    @classmethod
    def is_on(cls, config: Recipe) -> bool:
        return config.section("masked").target == "tokens"

    @property
    def settings(self) -> TokenConfig:
        return self.config.section("masked").tokens

    def check(self) -> None:
        compares_views = self.config.pairs and self.settings.view == "other"
        if compares_views and not self.config.augmentation.shared_affine:
            raise UserError(
                "masked.target=tokens compares the two views place by place: set augmentation.shared_affine=true, or "
                "masked.tokens.view=own."
            )
        if not 0 <= self.settings.level < self.config.maps:
            raise UserError(f"masked.tokens.level is {self.settings.level}; the maps are 0 to {self.config.maps - 1}.")
        if len(self.config.objectives) == 1 and self.settings.level < self.config.maps - 1:
            raise UserError(
                f"masked.target=tokens by itself looks at map {self.settings.level} and would leave the encoder beyond "
                f"it untrained: set masked.tokens.level={self.config.maps - 1}, or contrastive.pairs."
            )

    def build_head(self, encoder: Encoder) -> TokenHead:
        own = self.settings
        return TokenHead(encoder.channels[own.level], own.hidden, own.bottleneck, own.prototypes)

    def build_state(self) -> Centre:
        return Centre(self.settings.prototypes)

    def ramps(self) -> dict[str, Ramp]:
        return {"teacher_temperature": self.settings.teacher_temperature}

    def teach(self, key: EncoderWithHeads, maps: Sequence[Tensor], examples: Examples) -> Tensor:
        """For each view the scores (N, tokens, K) of the view that it is to tell: the other one, if it has one, or its
        own."""
        scores = key.head(self.head_name, maps[self.settings.level])
        if self.settings.view == "own":
            return scores
        by_view = examples.batch.views.shape[:2]
        paired = by_view.numel()
        of_other_view = scores[:paired].unflatten(0, by_view).flip(0).flatten(0, 1)
        return torch.cat([of_other_view, scores[paired:]])

    def branch(self, query: EncoderWithHeads, given: Pass) -> Branch:
        level, strides = self.settings.level, query.encoder.strides
        hidden = expand_mask(given.examples.hidden, given.maps[level].shape[2:], strides[-1] // strides[level]).flatten(
            1
        )
        result = distillation(
            query.head(self.head_name, given.maps[level]),
            given.taught,
            hidden,
            given.state.mean,
            student_temperature=self.settings.student_temperature,
            teacher_temperature=given.schedule["teacher_temperature"],
        )
        figures = {"loss/masked": result.loss.detach(), "masked/prototypes_used": result.perplexity}
        return Branch(loss=self.config.section("masked").weight * result.loss, figures=figures, kept=result.centre)

    def remember(self, state: Centre, parts: Sequence[Part]) -> None:
        """Put the teacher's mean scores on all ranks into their running mean."""
        centre = torch.stack([part.branch.kept for part in parts]).mean(dim=0)
        distributed.average_([centre])
        state.mean.lerp_(centre, 1 - self.settings.centre_momentum)


class Centre(nn.Module):
    """The running mean (K,) of the teacher's scores."""

    mean: Tensor

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(prototypes))


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
