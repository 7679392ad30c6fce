"""The augmentation of pre-training: parameters drawn beside the data, applied in batches on the training device.

The list and its numbers are the paper's (arXiv 2511.11311) and its code's: flip left-right (shared by the views of a
pair), affine; [the target of masked image modelling is taken here]; stretch around the mean, noise; one artefact of
blur, bias field, Gibbs ringing; one acquisition of gamma, low resolution. The reference applies the intensity steps
to the whole volume before the patch is cut, we to the patch: means and ranges are the patch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.views import intensity
from nnunet_ssl.pretraining.views.spatial import affine_matrix, resample_all
from nnunet_ssl.pretraining.views.transfer import send

_LIMITS = {
    "scale": (0, 0.9),
    "noise_std": (0, inf),
    "smooth_sigma": (0.01, inf),
    "gibbs": (0, 1),
    "gamma": (0.01, inf),
    "low_resolution": (0.01, 1),
}
"""Beyond these a transform turns a view inside out or into numbers that are none."""


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Ranges of the parameters, and how often each transform is applied. Ranges are uniform."""

    flip_probability: float = 0.5  # left to right, all views of an example alike
    rotation: float = 0.3  # radians around each axis, + or -
    scale: float = 0.1  # of each axis, + or -
    shear: float = 0.3  # of each pair of axes, + or -
    shared_affine: bool = False  # the views of a pair share their affine map, so that they match voxel by voxel
    contrast_probability: float = 0.8  # of each view
    contrast: float = 0.1  # stretch around the mean, + or -
    noise_probability: float = 0.3  # of each view
    noise_std: float = 0.01  # at most; in standard deviations of the brain, since scans are z-scored
    artefact_probability: float = 0.7  # one of the next three, each as likely as the others
    smooth_sigma: tuple[float, float] = (0.5, 1.0)  # voxels, drawn for each axis
    bias_field: tuple[float, float] = (0.0, 0.05)  # each coefficient
    gibbs: tuple[float, float] = (0.2, 0.4)  # share of the frequency radius that is cut
    gamma_probability: float = 1.0  # half of the views are offered gamma, the others low resolution
    gamma: tuple[float, float] = (0.9, 1.1)  # exponent
    low_resolution_probability: float = 0.5  # of the views that are offered it
    low_resolution: tuple[float, float] = (0.8, 1.0)  # zoom

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, tuple | list) and not (len(value) == 2 and value[0] <= value[1]):
                raise UserError(f"augmentation.{name} is {value}; it is a range: two numbers, the smaller first.")
            low, high = (0, 1) if name.endswith("_probability") else _LIMITS.get(name, (-inf, inf))
            if not (low <= np.min(value) and np.max(value) <= high):
                raise UserError(f"augmentation.{name} is {value}; it must lie between {low} and {high}.")


def draw_flip(config: AugmentationConfig, rng: np.random.Generator) -> bool:
    """Draw whether an example, all its views alike, is mirrored left to right."""
    return bool(rng.random() < config.flip_probability)


def draw_matrix(
    config: AugmentationConfig, flip_axis: int | None, spacing: Sequence[float], rng: np.random.Generator
) -> np.ndarray:
    """Draw the affine map of one view: offsets in the view to offsets in the volume, (3, 3), in voxels."""
    return affine_matrix(
        flip_axis=flip_axis,
        rotation=rng.uniform(-config.rotation, config.rotation, 3),
        scale=1 + rng.uniform(-config.scale, config.scale, 3),
        shear=rng.uniform(-config.shear, config.shear, 3),
        spacing=spacing,
    )


@dataclass(frozen=True, kw_only=True)
class Intensities:
    """What happens to the intensities of one view, in this order; None where a step is left out."""

    contrast: float | None = None
    noise: tuple[float, int] | None = None  # standard deviation and seed
    smooth: tuple[float, ...] | None = None
    bias_field: tuple[float, ...] | None = None
    gibbs: float | None = None
    gamma: float | None = None
    low_resolution: float | None = None


def draw_intensities(config: AugmentationConfig, rng: np.random.Generator) -> Intensities:
    """Draw the intensity steps of one view."""
    drawn: dict[str, Any] = {}
    if rng.random() < config.contrast_probability:
        drawn["contrast"] = 1 + rng.uniform(-config.contrast, config.contrast)
    if rng.random() < config.noise_probability:
        drawn["noise"] = (rng.uniform(0, config.noise_std), int(rng.integers(2**63)))
    if rng.random() < config.artefact_probability:
        artefact = rng.choice(["smooth", "bias_field", "gibbs"])
        if artefact == "smooth":
            drawn["smooth"] = tuple(rng.uniform(*config.smooth_sigma, 3))
        elif artefact == "bias_field":
            drawn["bias_field"] = tuple(rng.uniform(*config.bias_field, len(intensity.BIAS_TERMS)))
        else:
            drawn["gibbs"] = rng.uniform(*config.gibbs)
    if rng.random() < 0.5:
        if rng.random() < config.gamma_probability:
            drawn["gamma"] = rng.uniform(*config.gamma)
    elif rng.random() < config.low_resolution_probability:
        drawn["low_resolution"] = rng.uniform(*config.low_resolution)
    return Intensities(**drawn)


@dataclass(kw_only=True)
class RawBatch:
    """A batch as a worker hands it over: voxels as they are stored, and what is to be done to them.

    N = V * B views, those of view 0 first. The crops differ in size and lie one after the other in one tensor, so a
    batch is one piece of shared memory, one pinned buffer and one transfer. The rest is small and not in tensors.
    """

    voxels: Tensor  # (sum of the crops' sizes,) float16
    sizes: np.ndarray  # (N, 3) voxels of each crop
    matrices: np.ndarray  # (N, 3, 3) see nnunet_ssl.pretraining.views.spatial
    centres: np.ndarray  # (N, 3) the views' centres, in voxels of the volume
    origins: np.ndarray  # (N, 3) the crops' first voxels, in voxels of the volume
    intensities: list[Intensities]  # N
    patch_size: tuple[int, int, int]
    subject: np.ndarray  # (B,)
    session: np.ndarray  # (B,)
    modality: np.ndarray  # (V, B) places in nnunet_ssl.corpus.modalities.MODALITIES
    scan_ids: list[list[str]]  # V x B
    step: int

    def pin_memory(self) -> RawBatch:
        """Called by the DataLoader: move the voxels to page-locked memory, from which they travel asynchronously."""
        self.voxels = self.voxels.pin_memory()
        return self


@dataclass(kw_only=True)
class Batch:
    """A batch as the objectives use it, on the training device."""

    views: Tensor  # (V, B, 1, X, Y, Z) float32, after the intensity steps
    targets: Tensor  # (V, B, 1, X, Y, Z) float32, before them
    subject: Tensor  # (B,) long
    session: Tensor  # (B,) long
    scan_ids: list[list[str]]  # V x B
    step: int


@torch.no_grad()
def augment(raw: RawBatch, device: torch.device | str) -> Batch:
    """Warp and degrade a batch on `device`, always in float32: an autocast around the call changes nothing."""
    device = torch.device(device)
    with torch.autocast(device.type, enabled=False):
        voxels = raw.voxels.to(device, non_blocking=True)
        targets = resample_all(voxels, raw.sizes, raw.matrices, raw.centres - raw.origins, raw.patch_size)
        views = _degraded(targets, raw.intensities)
    shape = (*raw.modality.shape, 1, *raw.patch_size)
    subject, session = send(torch.from_numpy(np.stack([raw.subject, raw.session])), device)
    return Batch(
        views=views.view(shape),
        targets=targets.view(shape),
        subject=subject,
        session=session,
        scan_ids=raw.scan_ids,
        step=raw.step,
    )


def _degraded(targets: Tensor, intensities: Sequence[Intensities]) -> Tensor:
    """Apply each step to the views that drew it, batched: (N, X, Y, Z)."""
    views = targets.clone()
    for name, transform in STEPS.items():
        drawn = {n: value for n, one in enumerate(intensities) if (value := getattr(one, name)) is not None}
        intensity.apply(views, transform, drawn)
    return views


STEPS: dict[str, intensity.Transform] = {
    "contrast": intensity.scale_around_mean,
    "noise": lambda views, noise: intensity.add_noise(views, *zip(*noise)),
    "smooth": intensity.smooth,
    "bias_field": intensity.bias_field,
    "gibbs": intensity.gibbs,
    "gamma": intensity.gamma,
    "low_resolution": intensity.lower_resolution,
}
"""What is done for each field of :class:`Intensities`, in the paper's order."""
