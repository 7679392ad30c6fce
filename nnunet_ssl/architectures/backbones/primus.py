"""MIC-DKFZ's vision transformer, with its own decoder for segmentation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nnunet_ssl.architectures.backbones.base import Architecture, Backbone
from nnunet_ssl.architectures.backbones.tensors import Tensors, required
from nnunet_ssl.architectures.primus import SIZES, STRIDE, PrimusEncoder
from nnunet_ssl.errors import UserError
from nnunet_ssl.typed import ranged

PRIMUS_NETWORK = "nnunet_ssl.architectures.primus.PrimusNetwork"


@dataclass(frozen=True, kw_only=True)
class PrimusConfig:
    """Of ``backbone: primus``; see :class:`nnunet_ssl.architectures.primus.PrimusEncoder`. The default is Primus-M."""

    embed_dim: int = ranged(SIZES["M"]["embed_dim"], "at least 1")  # of a token; S 396, B 792, L 1056
    depth: int = ranged(SIZES["M"]["depth"], "at least 1")  # blocks; S and B 12, L 24
    heads: int = ranged(SIZES["M"]["heads"], "at least 1")  # of attention; S 6, B 12, L 16
    grid: tuple[int, ...] = (12, 12, 12)  # tokens for which positions are learned, a patch's edges by 8; other patches
    # resize them

    @property
    def maps(self) -> int:
        """How many maps it has: one, of the tokens."""
        return 1

    @property
    def stride(self) -> int:
        """Voxels per token along each axis."""
        return STRIDE

    def architecture(self, *, masked: bool) -> dict[str, Any]:
        """The keywords of PrimusEncoder; without masks it has no mask token, which nothing would train."""
        return {**asdict(self), "grid": list(self.grid), "mask_token": masked}


def primus_architecture(tensors: Tensors) -> dict[str, Any]:
    """Return what :func:`networks.build_encoder` takes, from tensors by PrimusEncoder's names.

    No tensor tells the heads: they are the published sizes', None for other widths. The positions are taken as a cube.

    Raises:
        UserError: tensors are missing, or the encoder is of a kind that PrimusEncoder cannot be.
    """
    stem, positions = required(tensors, "down_projection.proj.weight"), required(tensors, "eva.pos_embed")
    if stem.ndim != 5 or positions.ndim != 3:
        raise UserError(f"The stem and the positions have shapes {tuple(stem.shape)} and {tuple(positions.shape)}.")
    width, in_channels, *patch = stem.shape
    tokens = positions.shape[1]
    side = round(tokens ** (1 / 3))
    blocks = {int(match[1]) for match in (re.match(r"eva\.blocks\.(\d+)\.", name) for name in tensors) if match}
    if set(patch) != {STRIDE} or "register_tokens" in tensors or side**3 != tokens:
        raise UserError(
            f"The transformer has tokens of {list(patch)} voxels and {tokens} positions"
            f"{' and register tokens' if 'register_tokens' in tensors else ''}; here it has tokens of 8x8x8 voxels, a "
            "cube of positions, and nothing else."
        )
    if blocks != set(range(len(blocks))) or not blocks:
        raise UserError(f"The encoder is not complete: it has the blocks {sorted(blocks)}.")
    return {
        "backbone": "primus",
        "in_channels": in_channels,
        "embed_dim": width,
        "depth": len(blocks),
        "heads": next((size["heads"] for size in SIZES.values() if size["embed_dim"] == width), None),
        "grid": [side] * 3,
        "init_values": 0.1 if "eva.blocks.0.gamma_1" in tensors else None,
        "scale_attn_inner": "eva.blocks.0.attn.norm.weight" in tensors,
        "mask_token": "mask_token" in tensors,
    }


def primus_network(architecture: Architecture, planned: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of nnU-Net's plans, whatever was planned; a mask token has no use there."""
    encoder = {key: value for key, value in architecture.items() if key not in ("backbone", "in_channels")}
    return {
        "network_class_name": PRIMUS_NETWORK,
        "arch_kwargs": encoder | {"mask_token": False},
        "_kw_requires_import": [],
    }


def check_patch(patch_size: Sequence[int], entry: Mapping[str, Any]) -> None:
    """Refuse a patch of which a part would be padded to whole tokens.

    Raises:
        UserError: an edge of `patch_size` is no multiple of 8.
    """
    if any(edge % STRIDE for edge in patch_size):
        nearest = "x".join(str(max(round(edge / STRIDE), 1) * STRIDE) for edge in patch_size)
        raise UserError(
            f"A patch of {'x'.join(map(str, patch_size))} does not suit Primus, whose edges must be multiples of "
            f"{STRIDE}; the nearest is patch_size={nearest}."
        )


PRIMUS = Backbone(
    name="primus",
    encoder=PrimusEncoder,
    settings=PrimusConfig,
    anchor="down_projection.proj.weight",
    infer=primus_architecture,
    minimum_fraction=0.9,
    plans_entry=primus_network,
    network_class=PRIMUS_NETWORK,
    deep_supervision=False,
    check_patch=check_patch,
    recipe="primus",
    citation="Wald et al. Primus: enforcing attention usage for 3D medical image segmentation. arXiv 2503.01835, 2025.",
)
