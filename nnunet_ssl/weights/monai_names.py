"""SwinEncoder's tensors by the names of MONAI's SwinTransformer, and back."""

from __future__ import annotations

import re

from torch import Tensor

from nnunet_ssl.architectures.backbones.swin import swin_architecture
from nnunet_ssl.architectures.swin import relative_positions
from nnunet_ssl.errors import UserError
from nnunet_ssl.weights.pretrained import PretrainedEncoder

# Tried in order; a name that no rule matches is the same in both.
TO_MONAI = (
    (r"stages\.(\d)\.conv\.(conv\d)\.", r"layers\1c.0.layer.\2.conv."),
    (r"stages\.(\d)\.conv\.(norm\d)\.", r"layers\1c.0.layer.\2."),
    (r"stages\.(\d)\.merging\.", r"layers\1.0.downsample."),
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.0\.", r"layers\1.0.blocks.\2.mlp.linear1."),
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.2\.", r"layers\1.0.blocks.\2.mlp.linear2."),
    (r"stages\.(\d)\.blocks\.", r"layers\1.0.blocks."),
)
# MONAI's published self-supervised weights call the layers of an MLP fc1 and fc2; UMBRA wraps the patch embedding.
FROM_MONAI = (
    (r"layers(\d)c\.0\.layer\.(conv\d)\.conv\.", r"stages.\1.conv.\2."),
    (r"layers(\d)c\.0\.layer\.(norm\d)\.", r"stages.\1.conv.\2."),
    (r"layers(\d)\.0\.downsample\.", r"stages.\1.merging."),
    (r"layers(\d)\.0\.blocks\.(\d+)\.mlp\.(?:linear1|fc1)\.", r"stages.\1.blocks.\2.mlp.0."),
    (r"layers(\d)\.0\.blocks\.(\d+)\.mlp\.(?:linear2|fc2)\.", r"stages.\1.blocks.\2.mlp.2."),
    (r"layers(\d)\.0\.blocks\.", r"stages.\1.blocks."),
)
FROM_UMBRA = {
    "patch_embed.patch_embed.": "patch_embed.",
    "patch_embed.mask_token_injector.mask_token": "mask_token",
}


def to_monai(name: str) -> str:
    """Return MONAI's name of one of SwinEncoder's tensors (stages count from 0 here, from 1 there)."""
    return _renamed(name, TO_MONAI, +1)


def from_monai(name: str) -> str:
    """Return SwinEncoder's name of a tensor of MONAI's SwinTransformer, or of UMBRA's encoder around it."""
    for theirs, ours in FROM_UMBRA.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return _renamed(name, FROM_MONAI, -1)


def _renamed(name: str, rules: tuple[tuple[str, str], ...], step: int) -> str:
    for pattern, replacement in rules:
        match = re.match(pattern, name)
        if match:
            stage = str(int(match[1]) + step)
            return replacement.replace(r"\1", stage).replace(r"\2", match.groups()[-1]) + name[match.end() :]
    return name


def monai_state_dict(pretrained: PretrainedEncoder) -> dict[str, Tensor]:
    """Return a state dict for MONAI's SwinTransformer, with ``use_v2=True`` if the encoder has conv blocks.

    MONAI has no mask token, which is left out. Norms with weights keep theirs: MONAI's class takes them once its
    InstanceNorms are replaced by GroupNorms.

    Raises:
        UserError: the encoder is no Swin, or has not MONAI's four stages.
    """
    if pretrained.architecture["backbone"] != "swin":
        raise UserError("This is no Swin encoder: MONAI's SwinTransformer cannot take its weights.")
    architecture = swin_architecture(pretrained.tensors)
    if len(architecture["depths"]) != 4:
        raise UserError(f"MONAI's SwinTransformer has four stages; this encoder has {len(architecture['depths'])}.")
    index = relative_positions(architecture["window_size"])
    state = {}
    for name, tensor in pretrained.tensors.items():
        if name == "mask_token":
            continue
        state[to_monai(name)] = tensor
        if name.endswith("relative_position_bias_table"):
            state[to_monai(name).replace("bias_table", "index")] = index
    return state
