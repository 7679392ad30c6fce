"""Dense aligned consistency: a place of one view is to be found among the places of the other one.

DenseCL (arXiv 2011.09157) with correspondence known instead of guessed, as PixPro has it (arXiv 2011.10043): the two
views of a pair share their affine map, so a cell of the one shows what the same cell of the other one shows. With two
modalities of a session as views, a cell's features become what both modalities tell of the place. In medical images,
local contrastive learning is of Chaitanya et al. (arXiv 2006.10511) and of SAM (arXiv 2012.02383), which also takes
cells of one image that lie apart as negatives; voxels that agree across contrasts, there synthetic, of anatomix
(arXiv 2411.02372).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_ssl.architectures.backbones.base import Encoder
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.objectives.base import Branch, EncoderWithHeads, Examples, Objective, Pass
from nnunet_ssl.pretraining.objectives.contrastive import InfoNCE, Projection, info_nce_of_candidates
from nnunet_ssl.pretraining.run.panels import GREEN, Panel, both
from nnunet_ssl.pretraining.views.sampling import CELLS
from nnunet_ssl.pretraining.views.spatial import unravelled
from nnunet_ssl.pretraining.views.transfer import send
from nnunet_ssl.typed import ranged

FOREGROUND = 0.5
"""Share of a cell's voxels that must be brain, in both views, for the cell to be compared."""


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """The dense branch: corresponding cells of two views have the same features."""

    weight: float = ranged(1.0, "0 or more")  # of the branch
    stride: int = ranged(8, "at least 1")  # voxels per cell of the map that is compared
    temperature: float = ranged(0.2, "positive")  # of the softmax over cells
    hidden: int = ranged(512, "at least 1")  # width of the projection head's hidden layer
    dim: int = ranged(128, "at least 1")  # of queries and keys
    cells: int = ranged(64, "at least 1")  # drawn of each pair, at each step
    apart: int = ranged(2, "at least 1")  # cells, along the axis on which they differ most: nearer ones of a pair are
    # no negatives


@dataclass(frozen=True, kw_only=True)
class Taught:
    """What the key network makes of cells that were drawn."""

    keys: Tensor  # (V, B, M, D) on the unit sphere
    cells: Tensor  # (B, M) long, places in the flattened map
    counted: Tensor  # (B, M) bool: whether the cell shows brain


class Dense(Objective):
    """Each cell's query is to find the key of the same cell in the other view among those of other places and heads."""

    name = "dense"
    section = "dense"
    section_type = DenseConfig
    head_name = "dense_projection"
    needs_keys = True
    shapes = ("dense.stride", "dense.hidden", "dense.dim")
    in_the_log = {"loss/dense": "dense {:.4f}", "dense/accuracy": "place {:.2f}"}  # noqa: RUF012
    panels = (
        Panel("Dense loss / loss of guessing", both("dense/loss_over_guessing", GREEN), reference=1.0),
        Panel("Own place found in the other view, share", both("dense/accuracy", GREEN), limits=(0, 1)),
    )
    citations = (
        "Wang et al. Dense contrastive learning for self-supervised visual pre-training. CVPR 2021, arXiv 2011.09157.",
        "Xie et al. Propagate yourself: exploring pixel-level consistency for unsupervised visual representation "
        "learning. CVPR 2021, arXiv 2011.10043.",
    )

    def check(self) -> None:
        self.level_of(self.settings.stride)
        if self.config.pairs is None:
            raise UserError("dense compares two views: set contrastive.pairs=mcl, or cl.")
        if not self.config.augmentation.shared_affine:
            raise UserError("dense compares the two views voxel by voxel: set augmentation.shared_affine=true.")
        if self.config.sampling.jitter_mm:
            raise UserError("dense compares the two views voxel by voxel: set sampling.jitter_mm=0.")

    def build_head(self, encoder: Encoder) -> Projection:
        own = self.settings
        return Projection(self.channels_at(encoder, own.stride), own.hidden, own.dim)

    def teach(self, key: EncoderWithHeads, maps: Sequence[Tensor], examples: Examples) -> Taught:
        """The keys of the cells that are compared, of both views."""
        cells, counted = self.draw_cells(examples)
        return Taught(keys=self._project(key, maps, cells, examples), cells=cells, counted=counted)

    def branch(self, query: EncoderWithHeads, given: Pass) -> Branch:
        grid = given.maps[self.level_of(self.settings.stride)].shape[2:]
        result = dense_info_nce(
            self._project(query, given.maps, given.taught.cells, given.examples),
            given.taught.keys,
            unravelled(given.taught.cells, grid),
            given.taught.counted,
            given.examples.batch.subject,
            apart=self.settings.apart,
            temperature=self.settings.temperature,
        )
        figures = {
            "loss/dense": result.loss.detach(),
            "dense/accuracy": result.accuracy,
            "dense/negatives": result.negatives,
            "dense/loss_over_guessing": result.over_guessing,
        }
        return Branch(loss=self.settings.weight * result.loss, figures=figures)

    def draw_cells(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """Draw cells that show brain in both views; what is drawn follows from the seed, the step and the place.

        Returns:
            (B, M) long, places in the flattened map; and (B, M) bool, False where a pair has not so many.
        """
        brain = F.avg_pool3d(examples.brain.float(), self.settings.stride, ceil_mode=True) >= FOREGROUND
        brain = brain.unflatten(0, examples.batch.views.shape[:2]).all(dim=0).flatten(1)
        origin = [self.config.seed, CELLS, examples.batch.step]
        numbers = [
            np.random.default_rng([*origin, place, 0]).random(brain.shape[1], np.float32) for place in examples.places
        ]
        drawn = send(torch.from_numpy(np.stack(numbers)), brain.device).masked_fill(~brain, -1.0)
        best = drawn.topk(min(self.settings.cells, brain.shape[1]), dim=1)
        return best.indices, best.values >= 0

    def _project(self, network: EncoderWithHeads, maps: Sequence[Tensor], cells: Tensor, examples: Examples) -> Tensor:
        """The head's output (V, B, M, D) for the cells of paired views."""
        by_view = examples.batch.views.shape[:2]
        level = maps[self.level_of(self.settings.stride)][: math.prod(by_view)].flatten(2).transpose(1, 2)
        chosen = cells.repeat(by_view[0], 1)[..., None].expand(-1, -1, level.shape[-1])
        return network.head(self.head_name, level.gather(1, chosen)).unflatten(0, by_view)


def dense_info_nce(
    queries: Tensor,
    keys: Tensor,
    position: Tensor,
    counted: Tensor,
    subject: Tensor,
    *,
    apart: int,
    temperature: float,
) -> InfoNCE:
    """Tell the key of the same cell in the other view from those of other subjects' cells and of distant ones.

    Args:
        queries: (2, B, M, D) on the unit sphere, of M cells of each view.
        keys: (2, B, M, D) of the same cells, without gradient.
        position: (B, M, 3) of the cells.
        counted: (B, M) bool: others have no part.
        subject: (B,) of the pairs. Another pair of the same subject gives no negatives.
        apart: cells of a pair are negatives from this distance on, along the axis on which they differ most.
        temperature: of the softmax.
    """
    pairs, cells = counted.shape
    similarity = queries.flatten(1, 2) @ keys.flip(0).flatten(1, 2).mT
    far = (position[:, :, None] - position[:, None]).abs().amax(dim=-1) >= apart
    itself = torch.eye(cells, dtype=torch.bool, device=counted.device)
    candidates = (subject[:, None] != subject)[:, None, :, None].repeat(1, cells, 1, cells)
    candidates.diagonal(dim1=0, dim2=2).copy_((far | itself).permute(1, 2, 0))
    excluded = ~(candidates & counted).flatten(2).flatten(0, 1)
    match = torch.arange(pairs * cells, device=counted.device)
    return info_nce_of_candidates(
        similarity.flatten(0, 1), match.repeat(2), excluded.repeat(2, 1), counted.flatten().repeat(2), temperature
    )
