"""What the encoder is asked to do, an objective a file. Further ones come from packages that announce them."""

from __future__ import annotations

from functools import cache

from nnunet_ssl.extensions import announced as load_announced
from nnunet_ssl.pretraining.objectives.base import Objective
from nnunet_ssl.pretraining.objectives.contrastive import Contrastive
from nnunet_ssl.pretraining.objectives.dense import Dense
from nnunet_ssl.pretraining.objectives.lesions import LesionSearch
from nnunet_ssl.pretraining.objectives.masked import Voxels
from nnunet_ssl.pretraining.objectives.tokens import Tokens

OWN: tuple[type[Objective], ...] = (Contrastive, Voxels, Tokens, LesionSearch, Dense)

ENTRY_POINTS = "nnunet_ssl.objectives"
"""The group under which an installed package names classes of objectives."""


@cache
def announced() -> tuple[type[Objective], ...]:
    """The objectives of other installed packages, in the order of their entry points' names."""
    return tuple(load_announced(ENTRY_POINTS))


def known() -> tuple[type[Objective], ...]:
    """Every objective that a recipe can have."""
    return (*OWN, *announced())
