"""Whose checkpoint is this: tensor names of MONAI and UMBRA, and the architecture that tensors imply."""

from __future__ import annotations

import re

# Ours -> MONAI's SwinTransformer, tried in order; a name that no rule matches is the same in both.
TO_MONAI = (
    (r"stages\.(\d)\.conv\.(conv\d)\.", r"layers\1c.0.layer.\2.conv."),
    (r"stages\.(\d)\.conv\.(norm\d)\.", r"layers\1c.0.layer.\2."),
    (r"stages\.(\d)\.merging\.", r"layers\1.0.downsample."),
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.0\.", r"layers\1.0.blocks.\2.mlp.linear1."),
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.2\.", r"layers\1.0.blocks.\2.mlp.linear2."),
    (r"stages\.(\d)\.blocks\.", r"layers\1.0.blocks."),
)
FROM_MONAI = (
    (r"layers(\d)c\.0\.layer\.(conv\d)\.conv\.", r"stages.\1.conv.\2."),
    (r"layers(\d)c\.0\.layer\.(norm\d)\.", r"stages.\1.conv.\2."),
    (r"layers(\d)\.0\.downsample\.", r"stages.\1.merging."),
    (r"layers(\d)\.0\.blocks\.(\d+)\.mlp\.linear1\.", r"stages.\1.blocks.\2.mlp.0."),
    (r"layers(\d)\.0\.blocks\.(\d+)\.mlp\.linear2\.", r"stages.\1.blocks.\2.mlp.2."),
    (r"layers(\d)\.0\.blocks\.", r"stages.\1.blocks."),
)


def to_monai(name: str) -> str:
    """Return MONAI's name of one of SwinEncoder's tensors (stages count from 0 here, from 1 there)."""
    return _renamed(name, TO_MONAI, +1)


def from_monai(name: str) -> str:
    """Return SwinEncoder's name of a tensor of MONAI's SwinTransformer."""
    return _renamed(name, FROM_MONAI, -1)


def _renamed(name: str, rules: tuple[tuple[str, str], ...], step: int) -> str:
    for pattern, replacement in rules:
        match = re.match(pattern, name)
        if match:
            stage = str(int(match[1]) + step)
            return replacement.replace(r"\1", stage).replace(r"\2", match[match.lastindex]) + name[match.end() :]
    return name
