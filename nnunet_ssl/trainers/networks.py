"""The segmentation network around a pre-trained encoder, as nnU-Net's plans describe it.

The description is all that stock prediction needs to build the network again. A Swin encoder gets the FPN decoder; a
residual encoder becomes nnU-Net's own ResidualEncoderUNet with the topology that nnU-Net planned for the data set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_ssl.errors import UserError

SWIN_FPN = "nnunet_ssl.architectures.networks.SwinFPN"
RESIDUAL_UNET = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"


def network_entry(architecture: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``architecture`` entry of a configuration for the encoder of a checkpoint.

    Args:
        architecture: the checkpoint's, as ``networks.build_encoder`` takes it.
        planned: the entry that nnU-Net's planner made.
    """
    if architecture["backbone"] == "swin":
        return _swin_fpn(architecture)
    if is_residual_unet(planned):
        return dict(planned)
    return _residual_unet(architecture, planned)


def is_residual_unet(entry: Mapping[str, Any]) -> bool:
    return entry["network_class_name"].endswith(".ResidualEncoderUNet")


def plans_residual_unet(plans: Mapping[str, Any]) -> bool:
    """Tell whether nnU-Net planned a residual encoder for the data set."""
    configurations = plans["configurations"].values()
    return any(is_residual_unet(each["architecture"]) for each in configurations if "architecture" in each)


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


def has_deep_supervision(entry: Mapping[str, Any]) -> bool:
    return entry["network_class_name"] != SWIN_FPN


def _swin_fpn(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Channels and classes come from the data set when nnU-Net builds the network; a mask token has no use there."""
    encoder = {key: value for key, value in architecture.items() if key not in ("backbone", "in_channels")}
    return {"network_class_name": SWIN_FPN, "arch_kwargs": encoder | {"mask_token": False}, "_kw_requires_import": []}


def _residual_unet(architecture: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, Any]:
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
