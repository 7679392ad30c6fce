"""Find a lesion again in another head: what is compared is what a synthetic lesion changes, not the head around it.

Contrastive learning of whole views has every reason to forget lesions: a head is told from others by its anatomy. Here
the same lesion, in shape, size and kind, is put into two heads. What it changes of their features, at its place, is to
match (SimCLR's InfoNCE, arXiv 2002.05709); all other lesions, and the same heads without it, where nothing changes, are
negatives. Whose head it is gives no answer, for that is in the features with the lesion and without it. Nothing else of
the recipe sees the lesions. Transplanting lesions between scans is of CarveMix (arXiv 2108.06883), for labelled data.

Features themselves are not compared, with clean places among the negatives, because that collapses: as long as a lesion
changes features less than another head does, the clean place is nearer than the match, and to make all alike is best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_ssl.architectures.backbones.base import Encoder
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.objectives.base import Branch, EncoderWithHeads, Objective, Pass
from nnunet_ssl.pretraining.objectives.contrastive import InfoNCE, Projection, info_nce_of_candidates
from nnunet_ssl.pretraining.run.panels import GREEN, Panel, both
from nnunet_ssl.pretraining.views.lesions import LesionRanges, draw_lesions, put
from nnunet_ssl.pretraining.views.transfer import send
from nnunet_ssl.typed import ranged

SMALLEST_PATCH = 8
"""Voxels; a lesion in a smaller one is the patch."""


@dataclass(frozen=True, kw_only=True)
class LesionSearchConfig:
    """The branch of synthetic lesions, which are found again in another head."""

    weight: float = ranged(1.0, "0 or more")  # of the branch
    stride: int = ranged(8, "at least 1")  # voxels per place of the map whose features are compared
    temperature: float = ranged(0.2, "positive")  # of the softmax over lesions
    hidden: int = ranged(512, "at least 1")  # width of the projection head's hidden layer
    dim: int = ranged(128, "at least 1")  # in which lesions are compared
    diameter: tuple[float, float] = ranged((3.0, 12.0), "at least 1")  # voxels, of the ball of the same volume, drawn
    # log-uniformly; at most half of the patch
    contrast: tuple[float, float] = ranged((0.5, 2.5), "positive")  # of a lesion with what it replaces, in standard
    # deviations of the view's brain
    opposite: float = ranged(0.5, "between 0 and 1")  # how often a lesion that is bright in one head is dark in the
    # other: which it is depends on the modality

    def __post_init__(self) -> None:
        for name in ("diameter", "contrast"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"lesions.{name} is {[low, high]}; it is a range: two numbers, the smaller first.")


class LesionSearch(Objective):
    """Each lesion is to be found in another head before all other lesions, and before none."""

    name = "lesions"
    section = "lesions"
    section_type = LesionSearchConfig
    head_name = "lesion_projection"
    shapes = ("lesions.stride", "lesions.hidden", "lesions.dim")
    in_the_log = {"loss/lesions": "lesions {:.4f}", "lesions/accuracy": "found {:.2f}"}  # noqa: RUF012
    panels = (
        Panel("Lesion loss / loss of guessing", both("lesions/loss_over_guessing", GREEN), reference=1.0),
        Panel("Lesion found in another head, share", both("lesions/accuracy", GREEN), limits=(0, 1)),
    )
    citations = (
        "Chen et al. A simple framework for contrastive learning of visual representations. ICML 2020, arXiv "
        "2002.05709.",
    )

    def check(self) -> None:
        level, last = self.level_of(self.settings.stride), self.config.maps - 1
        if len(self.config.objectives) == 1 and level < last:
            raise UserError(
                f"lesions by itself looks at the map of stride {self.settings.stride} and would leave the encoder "
                f"beyond it untrained: set lesions.stride={self.config.stride}, contrastive.pairs, or masked.target."
            )
        if self.config.shared_pass:
            raise UserError(
                "lesions compares views in which nothing is hidden: it cannot take part in shared_pass=true."
            )
        if min(self.config.patch_size) < SMALLEST_PATCH:
            raise UserError(
                f"patch_size {list(self.config.patch_size)} is too small for lesions: at least {SMALLEST_PATCH} voxels."
            )
        _require_two_heads(self.config.batch_size // self.config.accumulation)

    def build_head(self, encoder: Encoder) -> Projection:
        own = self.settings
        return Projection(self.channels_at(encoder, own.stride), own.hidden, own.dim)

    def branch(self, query: EncoderWithHeads, given: Pass) -> Branch:
        """The loss; at the cost of one more pass of the query network over the paired views, with lesions."""
        own, examples, level = self.settings, given.examples, self.level_of(self.settings.stride)
        _require_two_heads(len(examples.places))
        lesions = draw_lesions(
            len(examples.batch.views),
            self.ranges,
            seed=self.config.seed,
            step=examples.batch.step,
            places=examples.places,
        )
        count = len(lesions.of_view)
        lesioned = put(lesions, examples.paired_views[:count], examples.brain[:count])
        changes = query.encode(lesioned.views)[level].float() - given.maps[level][:count].float()
        by_lesion = send(torch.from_numpy(np.stack([np.arange(count // 2), lesions.second])), changes.device)
        effects = at_places(changes, lesioned.masks, own.stride)[by_lesion].flatten(0, 1)
        none = torch.zeros_like(effects[:1])
        projected = query.head(self.head_name, torch.cat([effects, none]))
        result = lesion_info_nce(
            projected[:-1].unflatten(0, (2, -1)), projected[-1], lesioned.placed[by_lesion].all(dim=0), own.temperature
        )
        figures = {
            "loss/lesions": result.loss.detach(),
            "lesions/accuracy": result.accuracy,
            "lesions/loss_over_guessing": result.over_guessing,
            "lesions/placed": lesioned.placed.float().mean(),
        }
        return Branch(loss=own.weight * result.loss, figures=figures)

    @property
    def ranges(self) -> LesionRanges:
        """Of the settings; no lesion is wider than half of the patch."""
        low, high = (min(one, min(self.config.patch_size) / 2) for one in self.settings.diameter)
        return LesionRanges(diameter=(low, high), contrast=self.settings.contrast, opposite=self.settings.opposite)


def _require_two_heads(examples: int) -> None:
    """Refuse a part of a step with too few examples.

    Raises:
        UserError: there are fewer than two.
    """
    if examples < 2:
        raise UserError(
            "lesions puts a lesion into two heads, so every process needs at least two examples in each part of a "
            "step: raise batch_size, or lower accumulation."
        )


def at_places(maps: Tensor, masks: Tensor, stride: int) -> Tensor:
    """The mean of maps over the cells that a mask touches, each by the share of it that is covered.

    Args:
        maps: (N, C, x, y, z).
        masks: (N, 1, X, Y, Z) bool.
        stride: voxels per cell.

    Returns:
        (N, C) float32; zeros where a mask is empty.
    """
    cells = F.avg_pool3d(masks.float(), stride, ceil_mode=True)
    return (maps.float() * cells).sum(dim=(2, 3, 4)) / cells.sum(dim=(2, 3, 4)).clamp_min(1e-6)


def lesion_info_nce(lesions: Tensor, none: Tensor, placed: Tensor, temperature: float) -> InfoNCE:
    """Tell each lesion in its other head from the other lesions in either head, and from none.

    Args:
        lesions: (2, L, D) on the unit sphere: what each changes in its first and in its second head.
        none: (D,) on the unit sphere: the same heads without it, where nothing changes.
        placed: (L,) bool: lesions that found no place in both heads have no part.
        temperature: of the softmax.
    """
    queries, count = lesions.flatten(0, 1), len(placed)
    similarity = queries @ torch.cat([queries, none[None]]).T
    itself = torch.eye(2 * count, 2 * count + 1, dtype=torch.bool, device=placed.device)
    missing = F.pad(~placed.repeat(2), (0, 1), value=False)
    match = torch.arange(2 * count, device=placed.device).roll(count)
    return info_nce_of_candidates(similarity, match, itself | missing, placed.repeat(2), temperature)
