"""Masked image modelling: hide cells of the bottleneck grid, reconstruct the intensities of their voxels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from nnunet_ssl.architectures.backbones.base import Encoder
from nnunet_ssl.architectures.fpn import FPNDecoder
from nnunet_ssl.architectures.masking import expand_mask
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.objectives.base import Branch, EncoderWithHeads, HeldOut, Objective, Pass, Recipe
from nnunet_ssl.pretraining.objectives.tokens import TokenConfig
from nnunet_ssl.pretraining.run.panels import ORANGE, Panel, both
from nnunet_ssl.pretraining.run.reconstructions import Reconstruction, reconstructions
from nnunet_ssl.typed import ranged

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class MaskedConfig:
    """The masked branch: cells of the bottleneck grid are hidden, and something of them is to be told."""

    target: Literal["voxels", "tokens", "none"] = "none"  # intensities, the key network's tokens, or no branch
    ratio: tuple[float, float] = (0.5, 0.75)  # share of hidden cells, drawn uniformly for each view
    weight: float = ranged(1.0, "0 or more")  # of the mean over views: 0.5 * (MIM1 + MIM2)
    width: int = ranged(32, "at least 1")  # of the decoder
    unpaired_batch_size: int = ranged(8, "0 or more")  # scans per step that cannot form a pair, for the objectives with
    # masks alone; 0 leaves them out
    tokens: TokenConfig = TokenConfig()

    def __post_init__(self) -> None:
        low, high = self.ratio
        if not 0 < low <= high < 1:
            raise UserError(f"masked.ratio is {list(self.ratio)}; it must be 0 < low <= high < 1.")


class Voxels(Objective):
    """Tell the intensities of the hidden voxels, before they were changed by augmentation."""

    name = "masked"
    section = "masked"
    section_type = MaskedConfig
    head_name = "decoder"
    masked = True
    shapes = ("masked.target", "masked.width")
    in_the_log = {"loss/masked": "masked {:.4f}"}  # noqa: RUF012
    panels = (
        Panel("Masked loss", both("loss/masked", ORANGE)),
        Panel("Masked error / error of predicting the mean", both("masked/error_over_mean", ORANGE), reference=1.0),
    )

    @classmethod
    def is_on(cls, config: Recipe) -> bool:
        return config.section("masked").target == "voxels"

    def build_head(self, encoder: Encoder) -> FPNDecoder:
        return FPNDecoder(encoder.channels, 1, width=self.settings.width, stride=encoder.strides[0])

    def branch(self, query: EncoderWithHeads, given: Pass) -> Branch:
        targets, stride = given.examples.targets, query.encoder.strides[-1]
        prediction = query.head(self.head_name, given.maps, targets.shape[2:])
        loss = reconstruction_error(prediction, targets, given.examples.hidden, stride).mean()
        with torch.no_grad():
            of_mean = error_of_the_mean(targets, given.examples.hidden, stride).mean()
        figures = {"loss/masked": loss.detach(), "masked/error_over_mean": loss.detach() / of_mean}
        return Branch(loss=self.settings.weight * loss, figures=figures)

    def held_out_figures(
        self, query: EncoderWithHeads, held_out: HeldOut, *, step: int
    ) -> tuple[dict[str, float], dict[str, Figure]]:
        """The error on hidden voxels by modality, and a scan of each."""
        figures, examples = self.reconstruct(query, held_out)
        return figures, {"reconstruction": reconstructions(examples, f"Reconstruction at step {step:,}")}

    @torch.no_grad()
    def reconstruct(self, query: EncoderWithHeads, held_out: HeldOut) -> tuple[dict[str, float], list[Reconstruction]]:
        """Reconstruct held-out scans under masks that are the same every time: errors by modality, a scan of each."""
        stride = query.encoder.strides[-1]
        device = next(query.parameters()).device
        generator = torch.Generator().manual_seed(self.config.seed)
        grid = bottleneck_grid(self.config.patch_size, stride)
        masks = draw_masks(len(held_out.patches), grid, self.settings.ratio, generator)
        errors: dict[str, list[float]] = defaultdict(list)
        shown: dict[str, Reconstruction] = {}
        for start in range(0, len(masks), self.config.batch_size):
            part = slice(start, start + self.config.batch_size)
            patches, mask = held_out.patches[part].to(device).float(), masks[part].to(device)
            prediction = query.head(self.head_name, query.encode(patches, mask), patches.shape[2:]).float()
            hidden = voxel_mask(mask, patches.shape[2:], stride)
            error = reconstruction_error(prediction, patches, mask, stride).tolist()
            for place, modality in enumerate(held_out.modality[part]):
                errors[modality].append(error[place])
                if modality not in shown:
                    slices = (_middle(one[place, 0]) for one in (patches, hidden, prediction))
                    shown[modality] = Reconstruction(modality, *slices)
        figures = {f"validation/error/{modality}": float(np.mean(errors[modality])) for modality in sorted(errors)}
        return figures, [shown[modality] for modality in sorted(shown)]


def _middle(volume: Tensor) -> np.ndarray:
    """The middle axial slice, the front of the head upwards; axes run from below, from behind and from the left."""
    return volume[len(volume) // 2].flip(0).cpu().numpy()


def bottleneck_grid(patch_size: Sequence[int], stride: int) -> tuple[int, ...]:
    """Cells of the bottleneck along each axis: (3, 3, 3) for 96^3 at stride 32."""
    return tuple(math.ceil(size / stride) for size in patch_size)


def draw_masks(count: int, grid: Sequence[int], ratio: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Draw which cells are hidden: for each view a share uniform in `ratio`, then that many cells at random.

    Shares are rounded to whole cells, and at least one cell stays hidden and one visible.

    Returns:
        (count, *grid) bool on the CPU, True where a cell is hidden.
    """
    cells = math.prod(grid)
    low, high = ratio
    share = low + (high - low) * torch.rand(count, generator=generator)
    hidden = (share * cells).round().clamp(1, cells - 1)
    rank = torch.rand(count, cells, generator=generator).argsort(dim=1).argsort(dim=1)
    return (rank < hidden[:, None]).reshape(count, *grid)


def reconstruction_error(prediction: Tensor, target: Tensor, mask: Tensor, stride: int) -> Tensor:
    """Mean squared error over the hidden voxels of each view.

    Args:
        prediction: (B, 1, X, Y, Z).
        target: (B, 1, X, Y, Z).
        mask: (B, *grid) bool, True where a cell is hidden.
        stride: voxels per cell along each axis.

    Returns:
        (B,) float32.
    """
    hidden = voxel_mask(mask, target.shape[2:], stride)
    squared = (prediction.float() - target.float()).square()
    return (squared * hidden).sum(dim=(1, 2, 3, 4)) / hidden.sum(dim=(1, 2, 3, 4))


def error_of_the_mean(target: Tensor, mask: Tensor, stride: int) -> Tensor:
    """The error (B,) of a prediction that knows no more than the mean of each view's hidden voxels: their variance."""
    hidden = voxel_mask(mask, target.shape[2:], stride)
    count = hidden.sum(dim=(2, 3, 4), keepdim=True)
    mean = (target.float() * hidden).sum(dim=(2, 3, 4), keepdim=True) / count
    return reconstruction_error(mean.expand_as(target), target, mask, stride)


def voxel_mask(mask: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """Bring a mask (B, *grid) to the voxels: (B, 1, *size)."""
    return expand_mask(mask, size, stride)[:, None]
