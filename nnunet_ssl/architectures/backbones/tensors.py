"""What the tensors of an encoder tell of it, whatever its kind."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from nnunet_ssl.errors import UserError

Tensors = Mapping[str, Tensor]


def required(tensors: Tensors, name: str) -> Tensor:
    """Return a tensor that the encoder must have.

    Raises:
        UserError: it has not.
    """
    if name not in tensors:
        raise UserError(f"The encoder is not complete: it has no tensor {name}.")
    return tensors[name]


def counts(tensors: Tensors, pattern: str) -> list[int]:
    """How many blocks each stage has, by names with the numbers of a stage and a block in it."""
    found = {(int(match[1]), int(match[2])) for match in (re.match(pattern, name) for name in tensors) if match}
    stages = sorted({stage for stage, _ in found})
    counts = [sum(stage == other for other, _ in found) for stage in stages]
    if not stages or stages != list(range(len(stages))) or len(found) != sum(counts):
        raise UserError(f"The encoder is not complete: it has stages {stages}.")
    return counts
