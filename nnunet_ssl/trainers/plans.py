"""Settings in nnU-Net's plans: every command of nnU-Net finds a training's settings by the name of its plans."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import written_beside
from nnunet_ssl.trainers.settings import Settings

SECTION = "nnunet_ssl"
"""The entry of the plans that holds what a fine-tuning adds: ``base`` (the plans it began with) and ``settings``."""

PREPARED_BY = ("image_reader_writer", "transpose_forward")
"""Entries of the plans that say how images are read and turned before they are preprocessed."""

PREPROCESSED_BY = ("spacing", "normalization_schemes", "use_mask_for_norm", "resampling_fn_data", "preprocessor_name")
"""Entries of a configuration that say how its data were preprocessed."""


def plans_with_settings(plans: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return a copy of nnU-Net's `plans` with the settings, and named after them.

    Patch and batch size go into all three-dimensional configurations. Plans that have settings already get the new ones
    in their place, and the name that the plans they were made from would get.
    """
    changed = copy.deepcopy(dict(plans))
    base = changed.get(SECTION, {}).get("base", changed["plans_name"])
    changed["plans_name"] = base + settings.suffix()
    as_json = {key: list(one) if isinstance(one, tuple) else one for key, one in dataclasses.asdict(settings).items()}
    changed[SECTION] = {"base": base, "settings": as_json}
    for name, configuration in changed["configurations"].items():
        if name.startswith("2d"):
            continue
        if settings.patch_size is not None:
            configuration["patch_size"] = list(settings.patch_size)
        if settings.batch_size is not None:
            configuration["batch_size"] = settings.batch_size
    return changed


def check_configuration(plans: Mapping[str, Any], configuration: str) -> None:
    """Refuse what a pre-trained 3-D encoder cannot be fine-tuned for.

    Raises:
        UserError: `configuration` is two-dimensional, a cascade, or not in the plans.
    """
    if configuration not in plans["configurations"]:
        known = ", ".join(plans["configurations"])
        raise UserError(f"The plans {plans['plans_name']} have no configuration {configuration}; they have: {known}.")
    if configuration.startswith("2d"):
        raise UserError("The encoder is pre-trained on 3-D patches: train 3d_fullres or 3d_lowres, not 2d.")
    if "previous_stage" in plans["configurations"][configuration]:
        raise UserError(
            f"{configuration} is the second stage of a cascade, whose input holds one-hot segmentations that the "
            "encoder never saw: train 3d_fullres or 3d_lowres."
        )


def refuse_stale(plans: Mapping[str, Any], configuration: str, folder: Path) -> None:
    """Refuse plans with settings if those that they were made from were made anew since, and with them the data.

    Args:
        plans: with settings.
        configuration: to train.
        folder: of the preprocessed data set, where the base lies.

    Raises:
        UserError: base and plans differ in how images are preprocessed, or the base has no such configuration any more.
    """
    base = folder / f"{plans[SECTION]['base']}.json"
    now = json.loads(base.read_text()) if base.is_file() else plans
    check_configuration(now, configuration)
    ways = []
    for one in (plans, now):
        settings = PlansManager(dict(one)).get_configuration(configuration).configuration
        ways.append({key: one.get(key) for key in PREPARED_BY} | {key: settings.get(key) for key in PREPROCESSED_BY})
    if changed := [key for key, value in ways[0].items() if ways[1][key] != value]:
        raise UserError(
            f"{plans['plans_name']} was made before {base.stem} was planned anew, with another {', '.join(changed)}. "
            f"The data are preprocessed as {base.stem} says: begin with -p {base.stem} and nnssl_settings."
        )


def offer_plans(plans: Mapping[str, Any], folder: Path) -> None:
    """Write `plans` among the preprocessed data set's, so that ``-p`` names them in every command of nnU-Net.

    ``nnUNetv2_find_best_configuration`` needs the file; without it (the folder may not be written to) the rest works.
    """
    kept = {key: value for key, value in plans.items() if key != "continue_training"}
    with contextlib.suppress(OSError), written_beside(folder / f"{plans['plans_name']}.json") as temporary:
        temporary.write_text(json.dumps(kept, indent=4))


def saved_plans(model_folder: Path | str) -> dict[str, Any]:
    """Return the plans saved beside a model's folds.

    Raises:
        UserError: there are none.
    """
    path = Path(model_folder) / "plans.json"
    if not path.is_file():
        raise UserError(f"{path} is missing, so the network of the checkpoint beside it is not known.")
    return json.loads(path.read_text())
