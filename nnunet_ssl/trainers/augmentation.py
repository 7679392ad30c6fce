"""nnU-Net's augmentation of whole batches: its own transforms draw the parameters, the training device applies them.

What is drawn, and how often, is decided by the transforms that nnU-Net builds, patch by patch; this module only does
to a batch what each of them does to one patch. A transform that is not known here is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.cropping import crop_tensor
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTransform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from torch import Tensor

from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.views import intensity
from nnunet_ssl.pretraining.views.spatial import sampling_grid
from nnunet_ssl.pretraining.views.transfer import send

Parameters = Sequence[Mapping[str, Any] | None]
"""For each patch what the `get_parameters` of a transform returns, or None where it is not applied."""

SCORE = 1000.0
"""Of a label that is certain, in float16: nnU-Net's, whose rounding decides which labels are equally near."""


class BatchAugmentation:
    """Do to batches what nnU-Net's transforms do to patches.

    Args:
        transforms: what ``nnUNetTrainer.get_training_transforms`` returns.
        labels: all values that segmentations hold, the ignore label among them.

    Raises:
        UserError: one of the transforms, or one of its options, is not known here.
    """

    def __init__(self, transforms: ComposeTransforms, labels: Sequence[int]) -> None:
        self.transforms = list(transforms.transforms)
        self.labels = labels
        for each in self.transforms:
            _check(_inner(each))

    def draw(self, batch_size: int, channels: int, size: Sequence[int]) -> list[Parameters]:
        """Draw the parameters of each transform for each patch, from numpy's and torch's global generators.

        Args:
            batch_size: B.
            channels: of an image.
            size: voxels of the patches as they were cropped, before the spatial transform.
        """
        image = torch.empty(1).expand(channels, *size)  # transforms look at its shape; it takes no memory
        return [[_draw(each, image) for _ in range(batch_size)] for each in self.transforms]

    @torch.no_grad()
    def apply(
        self, images: Tensor, labels: Tensor, drawn: Sequence[Parameters]
    ) -> tuple[Tensor, Tensor | list[Tensor]]:
        """Apply what was drawn.

        Args:
            images: (B, C, *size) float32, in two or three dimensions.
            labels: (B, 1, *size), any integer type, -1 outside the image.
            drawn: from :meth:`draw`.

        Returns:
            Images (B, C, *patch size), and targets as nnU-Net's loader gives them: labels, regions (bool), or with deep
            supervision a list of them, finest first.
        """
        for each, parameters in zip(self.transforms, drawn, strict=True):
            each = _inner(each)
            if isinstance(each, SpatialTransform):
                images, labels = _warp(each, images, labels, parameters, self.labels)
            elif isinstance(each, DownsampleSegForDSTransform):
                return images, _at_scales(each, labels)
            elif type(each) in INTENSITIES:
                _change_intensities(each, images, parameters)
            elif type(each) in OTHERS:
                images, labels = OTHERS[type(each)](each, images, labels, parameters)
        return images, labels

    def __call__(self, batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Augment a batch of nnU-Net's loader, ``data`` and ``target``, on `device`."""
        images, labels = (batch[key].to(device, non_blocking=True) for key in ("data", "target"))
        batch_size, channels, *size = images.shape
        images, targets = self.apply(images, labels, self.draw(batch_size, channels, size))
        return {**batch, "data": images, "target": targets}


# --- drawing


def _inner(transform: BasicTransform) -> BasicTransform:
    return transform.transform if isinstance(transform, RandomTransform) else transform


def _draw(transform: BasicTransform, image: Tensor) -> Mapping[str, Any] | None:
    """Draw the parameters of one patch; None where the transform is not applied."""
    if isinstance(transform, RandomTransform):
        if not transform.get_parameters()["apply_transform"]:
            return None
        transform = transform.transform
    if isinstance(transform, SpatialTransform):
        seen = _folded(image) if _in_planes(transform, image.ndim - 1) else image
        return _map_alone(transform).get_parameters(image=seen)
    if isinstance(transform, GaussianNoiseTransform):
        seeds = torch.randint(2**62, (len(image),)).tolist()
        return {**transform.get_parameters(image=image), "seeds": seeds}
    if isinstance(transform, MirrorTransform) or type(transform) in INTENSITIES:
        return transform.get_parameters(image=image)
    return {}


def _map_alone(transform: SpatialTransform) -> SpatialTransform:
    """The transform of a patch of one voxel, which draws the same maps and makes no grid worth mentioning."""
    small = copy.copy(transform)
    small.patch_size, small._grid_cache = (1,) * len(transform.patch_size), {}
    return small


# --- space


def _in_planes(transform: SpatialTransform, dimensions: int) -> bool:
    """Whether it turns and scales volumes in the planes of their last two axes alone, as nnU-Net has it where these
    lie far apart (``do_dummy_2d_data_aug``)."""
    return len(transform.patch_size) < dimensions


def _folded(patches: Tensor) -> Tensor:
    """Put the first axis of space into the channels: (..., C, X, Y, Z) to (..., C * X, Y, Z)."""
    return patches.flatten(-4, -3)


def _warp(
    transform: SpatialTransform,
    images: Tensor,
    labels: Tensor,
    parameters: Parameters,
    values: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Cut the centre out of every patch, and interpolate those that are turned or scaled."""
    channels, in_planes = (images.shape[1], labels.shape[1]), _in_planes(transform, images.ndim - 2)
    if in_planes:
        images, labels = _folded(images), _folded(labels)
    size, patch_size = images.shape[2:], tuple(transform.patch_size)
    cut_images, cut_labels = (
        crop_tensor(one.flatten(0, 1), [n // 2 for n in size], patch_size, pad_kwargs={"value": outside})
        .reshape(*one.shape[:2], *patch_size)
        .clone()
        for one, outside in ((images, 0), (labels, transform.padding_value_seg))
    )
    maps = {n: one["affine"] for n, one in enumerate(parameters) if one and one["affine"] is not None}
    if maps:
        centre = np.tile((np.array(size) - 1) / 2, (len(maps), 1))
        grid = sampling_grid(np.stack([*maps.values()]), centre, patch_size, size, images.device)
        chosen = send(torch.tensor(list(maps)), images.device)
        turned = F.grid_sample(images.index_select(0, chosen), grid, align_corners=False)
        cut_images.index_copy_(0, chosen, turned)
        outside = transform.padding_value_seg
        turned = resample_labels(labels.index_select(0, chosen), grid, [*values, outside], outside)
        cut_labels.index_copy_(0, chosen, turned)
    if in_planes:
        cut_images, cut_labels = (one.unflatten(1, (n, -1)) for one, n in zip((cut_images, cut_labels), channels))
    return cut_images, cut_labels


def resample_labels(labels: Tensor, grid: Tensor, values: Sequence[int], outside: int) -> Tensor:
    """Give each voxel the label that linear interpolation finds the most of: no label is interpolated into another.

    Of labels that are equally near, the nearest voxel's is taken if it is one of them, else the smallest: nnU-Net's
    rule (``seg_tiebreak``), and its float16.

    Args:
        labels: (N, C, *size), any integer type.
        grid: (N, *patch_size, D), see `pretraining.views.spatial.sampling_grid`.
        values: all that `labels` may hold, and `outside`.
        outside: the label of all that lies outside.

    Returns:
        (N, C, *patch_size) of the type of `labels`.
    """
    nearest = F.grid_sample(labels.float() - outside, grid, mode="nearest", align_corners=False) + outside
    share = torch.empty_like(labels, dtype=torch.float32)

    def score(value: int) -> Tensor:
        beyond = SCORE if value == outside else 0.0  # grid_sample takes zeros from outside, so shift what is to be one
        torch.eq(labels, value, out=share).mul_(SCORE).sub_(beyond)
        return F.grid_sample(share, grid, align_corners=False).add_(beyond).half()

    first, *others = sorted(set(values))
    best = of_nearest = score(first)
    result = torch.full_like(nearest, first)
    for value in others:
        own = score(value)
        result.masked_fill_(own > best, value)
        of_nearest = torch.where(nearest == value, own, of_nearest)
        best = torch.maximum(own, best)
    return torch.where(of_nearest == best, nearest, result).to(labels.dtype)


def _mirror(
    transform: MirrorTransform, images: Tensor, labels: Tensor, parameters: Parameters
) -> tuple[Tensor, Tensor]:
    for axis in transform.allowed_axes:
        drawn = dict.fromkeys(n for n, one in enumerate(parameters) if one and axis in one["axes"])
        for each in (images, labels):
            _flip(each, drawn, axis + 2)
    return images, labels


def _flip(patches: Tensor, drawn: Mapping[int, None], axis: int) -> None:
    intensity.apply(patches, lambda chosen, _: chosen.flip(axis), drawn)


# --- intensities


def _change_intensities(transform: BasicTransform, images: Tensor, parameters: Parameters) -> None:
    """Apply a transform to the channels that drew it, each of which is one view; in two dimensions, of one slice."""
    channels = images.shape[1]
    change, per_channel = INTENSITIES[type(transform)]
    drawn = {
        n * channels + int(channel): value
        for n, one in enumerate(parameters)
        if one is not None
        for channel, value in per_channel(one)
    }
    views = images.flatten(0, 1)
    intensity.apply(views[:, None] if views.ndim == 3 else views, lambda *given: change(transform, *given), drawn)


def _noise(_: GaussianNoiseTransform, views: Tensor, drawn: Sequence[tuple[float, int]]) -> Tensor:
    return intensity.add_noise(views, *zip(*drawn))


def _blur(_: GaussianBlurTransform, views: Tensor, sigmas: Sequence[Sequence[float]]) -> Tensor:
    """nnU-Net's kernels end at the odd number of voxels nearest to six sigma; the image is reflected at its edge."""
    return intensity.smooth(views, [_three(one) for one in sigmas], reach=(3, 0.25), edge="reflect")


def _brighten(_: MultiplicativeBrightnessTransform, views: Tensor, factors: Sequence[float]) -> Tensor:
    return views * intensity.per_view(factors, views)


def _stretch(transform: ContrastTransform, views: Tensor, factors: Sequence[float]) -> Tensor:
    stretched = intensity.scale_around_mean(views, factors)
    return stretched.clamp(*intensity.ends(views)) if transform.preserve_range else stretched


def _lower_resolution(_: SimulateLowResolutionTransform, views: Tensor, zooms: Sequence[Sequence[float]]) -> Tensor:
    return intensity.lower_resolution(views, [_three(one) for one in zooms], mode="nearest-exact")


def _bend(_: GammaTransform, views: Tensor, drawn: Sequence[tuple[float, bool, bool]]) -> Tensor:
    """Gamma of the image or of its negative; where that is drawn, mean and standard deviation stay."""
    exponents, inverted, retained = zip(*drawn)
    sign = intensity.per_view([-1.0 if one else 1.0 for one in inverted], views)
    views = views * sign
    bent = intensity.gamma(views, exponents)
    (mean, std), (mean_bent, std_bent) = (_mean_and_std(one) for one in (views, bent))
    rescaled = (bent - mean_bent) * (std / std_bent.clamp_min(1e-7)) + mean
    return torch.where(intensity.per_view(retained, views) > 0, rescaled, bent) * sign


def _mean_and_std(views: Tensor) -> tuple[Tensor, Tensor]:
    return views.mean(intensity.SPACE, keepdim=True), views.std(intensity.SPACE, keepdim=True)


def _three(values: Sequence[float]) -> tuple[float, ...]:
    """A value for each of three axes; the first axis of a slice is one voxel long, and nothing happens along it."""
    return (1.0,) * (3 - len(values)) + tuple(map(float, values))


def _of_channels(drawn: Mapping[str, Any], *names: str) -> Iterable[tuple[Any, Any]]:
    """(channel, value), or (channel, values), of the parameters that go by channel; none where no channel drew any."""
    channels = drawn["apply_to_channel"]
    if len(channels) == 0:
        return zip()
    return zip(channels, drawn[names[0]] if len(names) == 1 else zip(*(drawn[name] for name in names)))


def _noise_of_channels(drawn: Mapping[str, Any]) -> Iterable[tuple[Any, Any]]:
    """One standard deviation for all channels, or one for each; each has its seed."""
    channels, stds = drawn["apply_idx"], drawn["sigmas"]
    return zip() if stds is None else zip(channels, zip(np.broadcast_to(stds, len(channels)), drawn["seeds"]))


Change = Callable[[Any, Tensor, Sequence[Any]], Tensor]
OfChannels = Callable[[Mapping[str, Any]], Iterable[tuple[Any, Any]]]

INTENSITIES: dict[type[BasicTransform], tuple[Change, OfChannels]] = {
    GaussianNoiseTransform: (_noise, _noise_of_channels),
    GaussianBlurTransform: (_blur, lambda drawn: zip(drawn["apply_to_channel"].nonzero(), drawn["sigmas"])),
    MultiplicativeBrightnessTransform: (_brighten, lambda drawn: _of_channels(drawn, "multipliers")),
    ContrastTransform: (_stretch, lambda drawn: _of_channels(drawn, "multipliers")),
    SimulateLowResolutionTransform: (_lower_resolution, lambda drawn: _of_channels(drawn, "scales")),
    GammaTransform: (_bend, lambda drawn: _of_channels(drawn, "gamma", "invert_image", "retain_stats")),
}
"""What is done to views, and how a transform's parameters become (channel, value), for each transform."""


# --- labels


def _mask(transform: MaskImageTransform, images: Tensor, labels: Tensor, _: Any) -> tuple[Tensor, Tensor]:
    outside = labels[:, transform.channel_idx_in_seg] < 0
    for channel in transform.apply_to_channels:
        images[:, channel].masked_fill_(outside, transform.set_outside_to)
    return images, labels


def _remove_label(transform: RemoveLabelTransform, images: Tensor, labels: Tensor, _: Any) -> tuple[Tensor, Tensor]:
    return images, labels.masked_fill(labels == transform.label_value, transform.set_to)


def _regions(
    transform: ConvertSegmentationToRegionsTransform, images: Tensor, labels: Tensor, _: Any
) -> tuple[Tensor, Tensor]:
    source = labels[:, transform.channel_in_seg]
    regions = [torch.stack([source == value for value in region.tolist()]).any(dim=0) for region in transform.regions]
    return images, torch.stack(regions, dim=1)


def _at_scales(transform: DownsampleSegForDSTransform, labels: Tensor) -> list[Tensor]:
    """nnU-Net's own, to which a batch is so many channels."""
    scales = transform(segmentation=labels.flatten(0, 1))["segmentation"]
    return [one.unflatten(0, labels.shape[:2]) for one in scales]


OTHERS: dict[type[BasicTransform], Callable[[Any, Tensor, Tensor, Any], tuple[Tensor, Tensor]]] = {
    MirrorTransform: _mirror,
    MaskImageTransform: _mask,
    RemoveLabelTransform: _remove_label,
    ConvertSegmentationToRegionsTransform: _regions,
}


# --- what can be done


def _check(transform: BasicTransform) -> None:
    in_and_out = {Convert3DTo2DTransform, Convert2DTo3DTransform, SpatialTransform, DownsampleSegForDSTransform}
    if type(transform) not in {*INTENSITIES, *OTHERS, *in_and_out}:
        raise UserError(
            f"The trainer augments with {type(transform).__name__}, which cannot be done to whole batches on the "
            "training device: augment on the CPU."
        )
    for name, value in SPATIAL_OPTIONS.items() if isinstance(transform, SpatialTransform) else ():
        if (found := getattr(transform, name, None)) != value:
            raise UserError(
                f"The trainer's SpatialTransform has {name}={found}; on the training device only "
                f"{value} can be done: augment on the CPU."
            )


SPATIAL_OPTIONS = {
    "random_crop": False,
    "p_elastic_deform": 0,
    "mode_image": "bilinear",
    "padding_mode_image": "zeros",
    "mode_seg": "bilinear",
    "border_mode_seg": "constant",
    "seg_tiebreak": "nearest",
    "align_corners": False,
}
"""nnU-Net's, which :func:`_warp` relies on."""
