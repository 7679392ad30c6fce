"""The backbones, a file each. Further ones come from packages that announce them."""

from __future__ import annotations

from functools import cache

from nnunet_ssl.architectures.backbones.base import Backbone
from nnunet_ssl.architectures.backbones.primus import PRIMUS
from nnunet_ssl.architectures.backbones.resenc import RESENC
from nnunet_ssl.architectures.backbones.swin import SWIN
from nnunet_ssl.errors import UserError
from nnunet_ssl.extensions import announced

ENTRY_POINTS = "nnunet_ssl.backbones"
"""The group under which an installed package names its records."""


@cache
def known() -> dict[str, Backbone]:
    """Every backbone by its name: ours, then those of other installed packages.

    Raises:
        UserError: a package's cannot be imported, or two have one name.
    """
    backbones = (SWIN, RESENC, PRIMUS, *announced(ENTRY_POINTS))
    by_name = {backbone.name: backbone for backbone in backbones}
    if len(by_name) < len(backbones):
        names = ", ".join(backbone.name for backbone in backbones)
        raise UserError(f"Two backbones have one name ({names}): another package's must have a name of its own.")
    return by_name


def backbone_of(name: object) -> Backbone:
    """Return the backbone of that name.

    Raises:
        UserError: there is none; lists those that there are.
    """
    if not isinstance(name, str) or name not in known():
        raise UserError(f"The backbone is '{name}'; it can be {', '.join(known())}.")
    return known()[name]
