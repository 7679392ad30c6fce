"""What other installed packages announce by entry points: objectives and backbones."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from nnunet_ssl.errors import UserError


def announced(group: str) -> list[Any]:
    """Load what packages name under `group`, in the order of the names.

    Raises:
        UserError: something cannot be imported; says which and of which package.
    """
    return [_load(one) for one in sorted(entry_points(group=group), key=lambda one: one.name)]


def _load(point: Any) -> Any:
    try:
        return point.load()
    except Exception as error:  # whatever somebody's package does when it is imported
        package = point.dist.name if point.dist else "a package"
        raise UserError(
            f"{package} announces '{point.name}' as one of {point.group}, but {point.value} cannot be imported "
            f"({type(error).__name__}: {error}). Mend it, or pip uninstall {package}."
        ) from error
