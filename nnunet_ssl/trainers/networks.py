"""The segmentation network around a pre-trained encoder, as nnU-Net's plans describe it.

The description is all that stock prediction needs to build the network again; what it is, the backbone decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunet_ssl.architectures.backbones import backbone_of, known
from nnunet_ssl.architectures.backbones.resenc import is_residual_unet


def network_entry(architecture: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``architecture`` entry of a configuration for the encoder of a checkpoint.

    Args:
        architecture: the checkpoint's, as ``networks.build_encoder`` takes it.
        planned: the entry that nnU-Net's planner made.

    Raises:
        UserError: the backbone is unknown.
    """
    return backbone_of(architecture["backbone"]).plans_entry(architecture, planned)


def has_deep_supervision(entry: Mapping[str, Any]) -> bool:
    """Whether the network of an entry has outputs at several scales."""
    of_class = {backbone.network_class: backbone.deep_supervision for backbone in known().values()}
    return of_class.get(entry["network_class_name"], True)


def plans_residual_unet(plans: Mapping[str, Any]) -> bool:
    """Tell whether nnU-Net planned a residual encoder for the data set."""
    configurations = plans["configurations"].values()
    return any(is_residual_unet(each["architecture"]) for each in configurations if "architecture" in each)
