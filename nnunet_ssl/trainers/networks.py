"""The segmentation network around a pre-trained encoder, as nnU-Net's plans describe it.

The description is all that stock prediction needs to build the network again; what it is, the backbone decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnunet_ssl.architectures.backbones import backbone_of, known
from nnunet_ssl.architectures.backbones.base import Backbone, SegmentationNetwork
from nnunet_ssl.architectures.backbones.resenc import is_residual_unet
from nnunet_ssl.architectures.channels import plain
from nnunet_ssl.errors import UserError
from nnunet_ssl.weights.decoders import kind_of, stages_of, width_of
from nnunet_ssl.weights.encoders import check_decoder

NO_DECODER = (
    "decoder=pretrained, and the checkpoint holds no decoder that could be loaded: leave it out, or, where the run "
    "learnt masked modelling and an earlier version wrote its encoder.safetensors, point nnssl_checkpoint to the "
    "checkpoint_final.pth beside it."
)


def network_entry(
    architecture: Mapping[str, Any],
    planned: Mapping[str, Any],
    decoder: str = "random",
    held: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Return the ``architecture`` entry of a configuration for the encoder of a checkpoint.

    Args:
        architecture: the checkpoint's, as ``networks.build_encoder`` takes it.
        planned: the entry that nnU-Net's planner made.
        decoder: ``random`` for the backbone's own network, ``unet``, or ``pretrained`` for one that takes the decoder
            that the checkpoint holds.
        held: the tensors of that decoder.

    Raises:
        UserError: the backbone is unknown or has no such decoder, or the checkpoint has not.
    """
    backbone, held = backbone_of(architecture["backbone"]), held or {}
    if decoder == "random":
        return backbone.plans_entry(architecture, planned)
    if decoder == "unet":
        return _unet_of(backbone).plans_entry(architecture, planned)
    kind = kind_of(held)
    network = next((one for one in backbone.networks if kind and one.decoder == kind), None)
    if network is None:
        raise UserError(NO_DECODER)
    check_decoder(held)
    entry = network.plans_entry(architecture, planned)
    if kind == "fpn":
        entry["arch_kwargs"]["width"] = width_of(held)
    elif (stages := entry["arch_kwargs"].get("n_stages")) and stages - 1 != stages_of(held):
        raise UserError(
            f"decoder=pretrained, and the checkpoint's decoder has {stages_of(held)} stages where the planned network "
            f"has {stages - 1}: they would work at other scales. Leave it out."
        )
    return entry


def _unet_of(backbone: Backbone) -> SegmentationNetwork:
    if backbone.decoder == "unet":
        raise UserError(
            f"decoder=unet is a choice for Swin encoders, and the checkpoint's backbone {backbone.name} has nnU-Net's "
            "U-Net decoder in any case: leave it out."
        )
    network = next((one for one in backbone.others if one.decoder == "unet"), None)
    if network is None:
        raise UserError(f"decoder=unet, and the backbone {backbone.name} has no such network: leave it out.")
    return network


def network_of(backbone: Backbone, entry: Mapping[str, Any]) -> SegmentationNetwork:
    """Return which of a backbone's networks an entry names."""
    return next((one for one in backbone.networks if one.network_class == plain(entry)["network_class_name"]), backbone)


def has_deep_supervision(entry: Mapping[str, Any], asked: bool | None = None) -> bool:
    """Whether the network of an entry is to be trained at several scales: where it can be, if nothing else is asked.

    Raises:
        UserError: it is asked of a network with one output.
    """
    networks = [network for backbone in known().values() for network in backbone.networks]
    of_class = {one.network_class: one.deep_supervision for one in networks}
    possible = of_class.get(plain(entry)["network_class_name"], True)
    if asked and not possible:
        raise UserError(
            "deep_supervision=true, and the FPN decoder has one output, at full resolution: leave it out, or take "
            "decoder=unet with a Swin encoder."
        )
    return possible if asked is None else asked


def plans_residual_unet(plans: Mapping[str, Any]) -> bool:
    """Tell whether nnU-Net planned a residual encoder for the data set."""
    configurations = plans["configurations"].values()
    return any(is_residual_unet(each["architecture"]) for each in configurations if "architecture" in each)
