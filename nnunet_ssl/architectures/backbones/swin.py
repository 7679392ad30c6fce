"""The paper's backbone: a Swin encoder, with an FPN decoder for segmentation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nnunet_ssl.architectures.backbones.base import Architecture, Backbone, SegmentationNetwork
from nnunet_ssl.architectures.backbones.tensors import Tensors, counts, required
from nnunet_ssl.architectures.swin import DEPTHS, EMBED_DIM, NUM_HEADS, WINDOW_SIZE, SwinEncoder
from nnunet_ssl.errors import UserError
from nnunet_ssl.typed import ranged

SWIN_FPN = "nnunet_ssl.architectures.networks.SwinFPN"
SWIN_UNET = "nnunet_ssl.architectures.networks.SwinUNet"

PARTS_OF_A_STAGE = re.compile(
    r"stages\.\d+\.(conv\..+|merging\.(norm|reduction)\.(weight|bias)"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.0|mlp\.2)\.(weight|bias)"
    r"|blocks\.\d+\.attn\.relative_position_bias_table)"
)
"""The tensors that a stage of SwinEncoder may have."""


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """Of ``backbone: swin``; see :class:`nnunet_ssl.architectures.swin.SwinEncoder`."""

    embed_dim: int = ranged(EMBED_DIM, "at least 1")  # channels of the finest map; each further one has twice as many
    depths: tuple[int, ...] = DEPTHS  # blocks per stage
    num_heads: tuple[int, ...] = NUM_HEADS  # of attention, per stage
    window_size: int = ranged(WINDOW_SIZE, "at least 1")  # tokens; 6 is faster at 96^3, but not the paper's
    mlp_ratio: float = ranged(4.0, "positive")  # width of a block's hidden layer, in multiples of its channels
    conv_norm: Literal["group", "instance"] = "group"  # of the conv blocks; group is the paper's, instance MONAI's

    @property
    def maps(self) -> int:
        """How many maps it has: the patch embedding's, and one of each stage's merging."""
        return len(self.depths) + 1

    def architecture(self, *, masked: bool) -> dict[str, Any]:
        """The keywords of SwinEncoder; without masks it has no mask token, which nothing would train."""
        sizes = {name: list(one) if isinstance(one, tuple) else one for name, one in asdict(self).items()}
        return {**sizes, "mask_token": masked}


def swin_architecture(tensors: Tensors) -> dict[str, Any]:
    """Return what :func:`networks.build_encoder` takes, from tensors by SwinEncoder's names.

    The bias table of an attention has (2 * window - 1)**3 rows and a column for each head. Norms of the conv blocks
    that have weights are taken as GroupNorms: MONAI's InstanceNorms have none. How many groups those have, and which
    tokens the mergings take, no tensor tells: these keys are left to the caller.

    Raises:
        UserError: tensors are missing, or the encoder is of a kind that SwinEncoder cannot be.
    """
    if "patch_embed.norm.weight" in tensors:
        raise UserError("The encoder normalises its patch embedding (patch_norm=True), which SwinEncoder does not.")
    in_stages = [name for name in tensors if name.startswith(("stages.", "layers"))]
    if others := [name for name in in_stages if not PARTS_OF_A_STAGE.fullmatch(name)]:
        raise UserError(
            "The encoder's stages have parts that SwinEncoder's have not, so its features would be others: "
            f"{', '.join(others[:4])}{', ...' if len(others) > 4 else ''}."
        )
    projection = required(tensors, "patch_embed.proj.weight")
    width, in_channels, *patch = projection.shape
    depths = counts(tensors, r"stages\.(\d+)\.blocks\.(\d+)\.")
    tables = [
        required(tensors, f"stages.{stage}.blocks.0.attn.relative_position_bias_table") for stage in range(len(depths))
    ]
    side = round(tables[0].shape[0] ** (1 / 3))
    if len(patch) != 3 or len(set(patch)) > 1 or any(side**3 != table.shape[0] for table in tables):
        raise UserError(
            f"The encoder has patches of {list(patch)} voxels and {[table.shape[0] for table in tables]} relative "
            "positions per window; SwinEncoder has cubic patches and cubic windows."
        )
    return {
        "backbone": "swin",
        "in_channels": in_channels,
        "embed_dim": width,
        "depths": depths,
        "num_heads": [table.shape[1] for table in tables],
        "window_size": (side + 1) // 2,
        "patch_size": patch[0],
        "mlp_ratio": required(tensors, "stages.0.blocks.0.mlp.0.weight").shape[0] / width,
        "conv_norm": _conv_norm(tensors, len(depths)),
        "mask_token": "mask_token" in tensors,
    }


def _conv_norm(tensors: Tensors, stages: int) -> str | None:
    """Return the norm of the conv blocks; what lies beside the convolutions must be the same in all stages."""
    pattern = re.compile(r"stages\.(\d+)\.conv\.(?!conv\d\.)(.+)")
    matches = [match for match in map(pattern.match, tensors) if match]
    norms = [{match[2] for match in matches if int(match[1]) == stage} for stage in range(stages)]
    group = {f"norm{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")}
    if all(one == group for one in norms):
        return "group"
    if any(norms):
        raise UserError(
            "the norms of the encoder's conv blocks are of an unknown kind: they have "
            f"{', '.join(sorted(set().union(*norms)))}. SwinEncoder's have weight and bias in all {stages} stages "
            "(group norms), or nothing (instance norms)."
        )
    return "instance" if "stages.0.conv.conv1.weight" in tensors else None


def swin_fpn(architecture: Architecture, planned: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of nnU-Net's plans for the FPN, whatever was planned."""
    return _entry(SWIN_FPN, architecture)


def swin_unet(architecture: Architecture, planned: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of nnU-Net's plans for the U-Net decoder, whatever was planned."""
    return _entry(SWIN_UNET, architecture)


def _entry(network_class: str, architecture: Architecture) -> dict[str, Any]:
    """Channels and classes come from the data set when nnU-Net builds the network; a mask token has no use there."""
    encoder = {key: value for key, value in architecture.items() if key not in ("backbone", "in_channels")}
    return {
        "network_class_name": network_class,
        "arch_kwargs": encoder | {"mask_token": False},
        "_kw_requires_import": [],
    }


def check_patch_of_unet(patch_size: Sequence[int], entry: Mapping[str, Any]) -> None:
    """Refuse a patch of which the decoder's coarsest stage would see a single place, which no instance norm can treat.

    Raises:
        UserError: no edge of `patch_size` is longer than that stage's stride.
    """
    numbers = entry["arch_kwargs"]
    stride = numbers.get("patch_size", 2) * 2 ** (len(numbers.get("depths", SwinConfig.depths)) - 1)
    if max(patch_size) <= stride:
        raise UserError(
            f"A patch of {'x'.join(map(str, patch_size))} does not suit decoder=unet: one edge at least must be longer "
            f"than {stride} voxels."
        )


SWIN = Backbone(
    name="swin",
    encoder=SwinEncoder,
    settings=SwinConfig,
    anchor="stages.0.blocks.0.attn.qkv.weight",
    infer=swin_architecture,
    minimum_fraction=0.9,  # the encoder is built from the checkpoint's own numbers
    plans_entry=swin_fpn,
    network_class=SWIN_FPN,
    deep_supervision=False,
    decoder="fpn",
    others=(
        SegmentationNetwork(
            plans_entry=swin_unet,
            network_class=SWIN_UNET,
            deep_supervision=True,
            decoder="unet",
            check_patch=check_patch_of_unet,
        ),
    ),
    citation="He et al. SwinUNETR-V2: stronger Swin transformers with stagewise convolutions for 3D medical image "
    "segmentation. MICCAI 2023.",
)
