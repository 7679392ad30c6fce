"""nnU-Net's residual encoder, which becomes nnU-Net's own ResidualEncoderUNet with the topology of its plans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nnunet_ssl.architectures.backbones.base import Architecture, Backbone, SegmentationNetwork
from nnunet_ssl.architectures.backbones.tensors import Tensors, counts, required
from nnunet_ssl.architectures.resenc import PRESETS, ResEncEncoder
from nnunet_ssl.errors import UserError

RESIDUAL_UNET = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
RESENC_FPN = "nnunet_ssl.architectures.networks.ResEncFPN"


@dataclass(frozen=True, kw_only=True)
class ResEncConfig:
    """Of ``backbone: resenc``; see :class:`nnunet_ssl.architectures.resenc.ResEncEncoder`."""

    preset: Literal["resenc_m", "resenc_l"] = "resenc_l"  # nnU-Net's; M and L are one encoder
    features: tuple[int, ...] | None = None  # channels per stage, in place of the preset's; the first stage has full
    # resolution, each further one halves the grid
    blocks: tuple[int, ...] | None = None  # residual blocks per stage, in place of the preset's

    def __post_init__(self) -> None:
        sizes = self.sizes()
        if not len(sizes["features"]) == len(sizes["blocks"]) >= 2:
            raise UserError(
                f"resenc.features {list(sizes['features'])} and resenc.blocks {list(sizes['blocks'])} must have one "
                "number for each stage, and two stages at least."
            )

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The numbers that build the encoder."""
        given = {"features": self.features, "blocks": self.blocks}
        return PRESETS[self.preset] | {name: values for name, values in given.items() if values is not None}

    @property
    def maps(self) -> int:
        """How many maps it has: one of each stage but the first, which works at full resolution."""
        return len(self.sizes()["features"]) - 1

    def architecture(self, *, masked: bool) -> dict[str, Any]:
        """The keywords of ResEncEncoder, which hides cells without a parameter."""
        return {name: list(values) for name, values in self.sizes().items()}


def resenc_architecture(tensors: Tensors) -> dict[str, Any]:
    """Return what :func:`networks.build_encoder` takes, from tensors by ResEncEncoder's names.

    Raises:
        UserError: tensors are missing, or the convolutions are not 3x3x3.
    """
    blocks = counts(tensors, r"stages\.(\d+)\.blocks\.(\d+)\.")
    stem = required(tensors, "stem.convs.0.conv.weight")
    firsts = [required(tensors, f"stages.{stage}.blocks.0.conv1.conv.weight") for stage in range(len(blocks))]
    kernels = {tuple(weight.shape[2:]) for weight in (stem, *firsts)}
    if kernels != {(3, 3, 3)}:
        raise UserError(f"The residual encoder has kernels of {sorted(kernels)}; only 3x3x3 can be read.")
    return {
        "backbone": "resenc",
        "in_channels": stem.shape[1],
        "features": [weight.shape[0] for weight in firsts],
        "blocks": blocks,
    }


def is_residual_unet(entry: Mapping[str, Any]) -> bool:
    """Tell whether an entry of plans asks for nnU-Net's residual network."""
    return entry["network_class_name"].endswith(".ResidualEncoderUNet")


def residual_unet(architecture: Architecture, planned: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of nnU-Net's plans: the planned residual network, or the checkpoint's on the planned stages."""
    return dict(planned) if is_residual_unet(planned) else _on_planned_stages(architecture, planned)


def _on_planned_stages(architecture: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, Any]:
    """Put the checkpoint's features and blocks on the stages that nnU-Net planned for another U-Net."""
    kept = {key: value for key, value in planned["arch_kwargs"].items() if not key.startswith("n_conv_per_stage")}
    stages = kept["n_stages"]
    sizes = {
        "features_per_stage": _lengthened(architecture["features"], stages),
        "n_blocks_per_stage": _lengthened(architecture["blocks"], stages),
        "n_conv_per_stage_decoder": [1] * (stages - 1),  # as nnU-Net's ResEnc planners have it
    }
    return {
        "network_class_name": RESIDUAL_UNET,
        "arch_kwargs": kept | sizes,
        "_kw_requires_import": list(planned["_kw_requires_import"]),
    }


def _lengthened(values: Sequence[int], length: int) -> list[int]:
    """Return the first `length` of `values`, the last of them repeated where there are fewer."""
    return [*values, *[values[-1]] * (length - len(values))][:length]


def check_patch(patch_size: Sequence[int], entry: Mapping[str, Any]) -> None:
    """Refuse a patch that a residual network's strides do not divide: its decoder could not join the scales.

    Raises:
        UserError: an edge of `patch_size` is no multiple of the product of the strides along its axis.
    """
    strides = [math.prod(axis) for axis in zip(*entry["arch_kwargs"]["strides"])]
    if any(edge % stride for edge, stride in zip(patch_size, strides)):
        nearest = [max(round(edge / stride), 1) * stride for edge, stride in zip(patch_size, strides)]
        raise UserError(
            f"A patch of {'x'.join(map(str, patch_size))} does not suit the residual network, whose edges must be "
            f"multiples of {'x'.join(map(str, strides))}; the nearest is patch_size={'x'.join(map(str, nearest))}."
        )


def resenc_fpn(architecture: Architecture, planned: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of the pre-training's own network, whatever was planned."""
    encoder = {key: value for key, value in architecture.items() if key not in ("backbone", "in_channels")}
    return {"network_class_name": RESENC_FPN, "arch_kwargs": encoder, "_kw_requires_import": []}


def check_more_than_one_cell(patch_size: Sequence[int], entry: Mapping[str, Any]) -> None:
    """Refuse a patch of which the coarsest stage would see a single place, which no instance norm can treat.

    Raises:
        UserError: no edge of `patch_size` is longer than the coarsest stride.
    """
    stride = 2 ** (len(entry["arch_kwargs"].get("features", ResEncConfig().sizes()["features"])) - 1)
    if max(patch_size) <= stride:
        raise UserError(
            f"A patch of {'x'.join(map(str, patch_size))} does not suit the residual encoder: one edge at least must "
            f"be longer than {stride} voxels."
        )


def stage_differences(architecture: Mapping[str, Any], entry: Mapping[str, Any]) -> list[str]:
    """Say for each stage of a residual encoder what differs between the checkpoint and the network.

    Weights tell nothing of strides, so a stage that looks at another scale is loaded, but said.
    """
    network = entry["arch_kwargs"]
    features, blocks = architecture["features"], architecture["blocks"]
    lines = []
    for stage in range(max(network["n_stages"], len(features))):
        if stage >= network["n_stages"]:
            lines.append(f"stage {stage}: in the checkpoint only, the network has {network['n_stages']} stages")
            continue
        if stage >= len(features):
            lines.append(f"stage {stage}: from random weights, the checkpoint has {len(features)} stages")
            continue
        expected = {
            "features_per_stage": (features[stage], "channels, weights that depend on them not loaded"),
            "n_blocks_per_stage": (blocks[stage], "blocks, the first of them loaded"),
            "kernel_sizes": ([3, 3, 3], "kernel, not loaded"),
            "strides": ([2, 2, 2] if stage else [1, 1, 1], "stride, loaded nevertheless"),
        }
        for key, (theirs, what) in expected.items():
            ours = network[key][stage]
            if ours != theirs:
                lines.append(f"stage {stage}: {theirs} in the checkpoint, {ours} in the network: {what}")
    return lines


RESENC = Backbone(
    name="resenc",
    encoder=ResEncEncoder,
    settings=ResEncConfig,
    anchor="stem.convs.0.conv.weight",
    infer=resenc_architecture,
    minimum_fraction=0.5,  # the stages are planned by nnU-Net for the data set and need not all agree
    plans_entry=residual_unet,
    network_class=RESIDUAL_UNET,
    deep_supervision=True,
    decoder="unet",
    check_patch=check_patch,
    differences=stage_differences,
    others=(
        SegmentationNetwork(
            plans_entry=resenc_fpn,
            network_class=RESENC_FPN,
            deep_supervision=False,
            decoder="fpn",
            check_patch=check_more_than_one_cell,
        ),
    ),
    normalises_maps=True,
    citation="Isensee et al. nnU-Net revisited: a call for rigorous validation in 3D medical image segmentation. "
    "MICCAI 2024.",
)
