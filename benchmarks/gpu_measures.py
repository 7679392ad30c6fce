"""What the checks of gpu_check.py share: where they run, how large their networks are, how numbers are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_ssl.pretraining.config import PretrainingConfig, load_config

BACKBONES = ("swin", "resenc")

SMALL = [
    "encoder.embed_dim=16",
    "encoder.depths=2,1",
    "encoder.num_heads=1,2",
    "encoder.window_size=4",
    "resenc.features=8,8,16,16",
    "resenc.blocks=1,1,1,1",
    "patch_size=32",
    "contrastive.hidden=32",
    "contrastive.dim=16",
    "masked.tokens={level: 1, prototypes: 64, hidden: 32, bottleneck: 16}",
]
PAPERS = ["patch_size=64"]
"""The paper's networks, in which the coarsest map still has eight places."""

ALWAYS = ["batch_size=2", "masked.unpaired_batch_size=1", "queue_size=32", "warmup=0", "workers=0", "compile=false"]


class Finding(NamedTuple):
    """What a check found; `passed` is None where the device cannot be asked."""

    passed: bool | None
    measured: str


Check = Callable[[], Finding]


@dataclass(frozen=True)
class Place:
    """Where checks run: the device, and a folder for everything that is written."""

    device: torch.device
    work: Path

    def config(self, recipe: str, backbone: str, *overrides: str, small: bool = False) -> PretrainingConfig:
        """A recipe with the paper's networks; with small ones where that is asked for, and on a CPU."""
        sizes = SMALL if small or self.device.type == "cpu" else PAPERS
        return load_config(recipe, [*ALWAYS, *sizes, f"backbone={backbone}", *overrides])


def difference(own: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest relative difference of a tensor, by norm.

    A tensor counts as a hundredth of all at least: the gradient of a bias before a norm is nothing but rounding.
    """
    own, reference = ([tensor.detach().cpu().double() for tensor in tensors] for tensors in (own, reference))
    floor = 1e-2 * torch.stack([tensor.norm() for tensor in reference]).norm()
    differences = [(a - b).norm() / torch.maximum(b.norm(), floor) for a, b in zip(own, reference, strict=True)]
    return float(torch.stack(differences).max())  # NaN, where one is


def verdict(measured: Mapping[str, float], limit: Callable[[str], float] | float) -> Finding:
    """Hold what was measured against its limits; NaN is beyond any."""
    limits = {name: limit(name) if callable(limit) else limit for name in measured}
    text = ", ".join(f"{name} {value:.1e} (limit {limits[name]:.0e})" for name, value in measured.items())
    return Finding(all(value <= limits[name] for name, value in measured.items()), text)
