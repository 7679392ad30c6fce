"""The recipes that come with the package: YAML files, and what commands and trainers tell of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nnunet_ssl.errors import UserError


@dataclass(frozen=True)
class About:
    """What a recipe's file says of itself, under the key ``about``."""

    learns: str  # in a few words
    trainer: str  # the nnU-Net trainer that fine-tunes its encoder


def recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in _shipped().glob("*.yaml"))


def about_recipes() -> dict[str, About]:
    """What each of them tells of itself, by name."""
    return {name: About(**read_recipe(_shipped() / f"{name}.yaml")["about"]) for name in recipes()}


def recipe_file(recipe: str | Path) -> Path:
    """The file of a recipe of the package, or the given file.

    Raises:
        UserError: there is neither.
    """
    path = _shipped() / f"{recipe}.yaml"
    if not path.is_file():
        path = Path(recipe)
    if not path.is_file():
        raise UserError(
            f"There is no recipe '{recipe}' and no file of that name. Recipes: {', '.join(recipes())}; "
            "or give the path of a YAML file."
        )
    return path


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys and values of a recipe's file.

    Raises:
        UserError: it is not YAML, or holds something else.
    """
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold 'key: value' lines.")
    return values


def _shipped() -> Path:
    return Path(str(resources.files("nnunet_ssl.pretraining") / "configs"))
