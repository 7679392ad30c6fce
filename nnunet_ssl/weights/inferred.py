"""The architecture that an encoder's tensors imply: shapes and names say all that its class wants to be told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnunet_ssl.errors import UserError

Tensors = Mapping[str, Tensor]

PARTS_OF_A_STAGE = re.compile(
    r"stages\.\d+\.(conv\..+|merging\.(norm|reduction)\.(weight|bias)"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.0|mlp\.2)\.(weight|bias)"
    r"|blocks\.\d+\.attn\.relative_position_bias_table)"
)
"""The tensors that a stage of SwinEncoder may have."""


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
    projection = _required(tensors, "patch_embed.proj.weight")
    width, in_channels, *patch = projection.shape
    depths = _counts(tensors, r"stages\.(\d+)\.blocks\.(\d+)\.")
    tables = [
        _required(tensors, f"stages.{stage}.blocks.0.attn.relative_position_bias_table") for stage in range(len(depths))
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
        "mlp_ratio": _required(tensors, "stages.0.blocks.0.mlp.0.weight").shape[0] / width,
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


def resenc_architecture(tensors: Tensors) -> dict[str, Any]:
    """Return what :func:`networks.build_encoder` takes, from tensors by ResEncEncoder's names.

    Raises:
        UserError: tensors are missing, or the convolutions are not 3x3x3.
    """
    blocks = _counts(tensors, r"stages\.(\d+)\.blocks\.(\d+)\.")
    stem = _required(tensors, "stem.convs.0.conv.weight")
    firsts = [_required(tensors, f"stages.{stage}.blocks.0.conv1.conv.weight") for stage in range(len(blocks))]
    kernels = {tuple(weight.shape[2:]) for weight in (stem, *firsts)}
    if kernels != {(3, 3, 3)}:
        raise UserError(f"The residual encoder has kernels of {sorted(kernels)}; only 3x3x3 can be read.")
    return {
        "backbone": "resenc",
        "in_channels": stem.shape[1],
        "features": [weight.shape[0] for weight in firsts],
        "blocks": blocks,
    }


def _required(tensors: Tensors, name: str) -> Tensor:
    if name not in tensors:
        raise UserError(f"The encoder is not complete: it has no tensor {name}.")
    return tensors[name]


def _counts(tensors: Tensors, pattern: str) -> list[int]:
    """How many blocks each stage has, by names with the numbers of a stage and a block in it."""
    found = {(int(match[1]), int(match[2])) for match in (re.match(pattern, name) for name in tensors) if match}
    stages = sorted({stage for stage, _ in found})
    counts = [sum(stage == other for other, _ in found) for stage in stages]
    if not stages or stages != list(range(len(stages))) or len(found) != sum(counts):
        raise UserError(f"The encoder is not complete: it has stages {stages}.")
    return counts
