"""The backbones, a file each. Further ones come from packages that announce them."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from nnunet_ssl.architectures.backbones.base import Backbone
from nnunet_ssl.architectures.backbones.resenc import RESENC
from nnunet_ssl.architectures.backbones.swin import SWIN
from nnunet_ssl.errors import UserError

ENTRY_POINTS = "nnunet_ssl.backbones"
"""The group under which an installed package names its records."""


@cache
def known() -> dict[str, Backbone]:
    """Every backbone by its name: ours, then those of other installed packages."""
    others = [one.load() for one in sorted(entry_points(group=ENTRY_POINTS), key=lambda one: one.name)]
    return {backbone.name: backbone for backbone in (SWIN, RESENC, *others)}


def backbone_of(name: object) -> Backbone:
    """Return the backbone of that name.

    Raises:
        UserError: there is none; lists those that there are.
    """
    if not isinstance(name, str) or name not in known():
        raise UserError(f"The backbone is '{name}'; it can be {', '.join(known())}.")
    return known()[name]
