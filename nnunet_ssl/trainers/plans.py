"""What a fine-tuning writes into nnU-Net's plans, so that stock prediction rebuilds its network from them alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.settings import Settings

NETWORK = "nnunet_ssl.architectures.networks.SwinFPN"


def plans_with_settings(plans: Mapping[str, Any], configuration: str, settings: Settings) -> dict[str, Any]:
    """Return a copy of nnU-Net's `plans` with the settings' name suffix, patch and batch size.

    Raises:
        UserError: `configuration` is two-dimensional, a cascade, or not in the plans.
    """
    plans = copy.deepcopy(dict(plans))
    if configuration not in plans["configurations"]:
        known = ", ".join(plans["configurations"])
        raise UserError(f"The plans {plans['plans_name']} have no configuration {configuration}; they have: {known}.")
    chosen = plans["configurations"][configuration]
    if configuration.startswith("2d"):
        raise UserError("The encoder is pre-trained on 3-D patches: train 3d_fullres or 3d_lowres, not 2d.")
    if "previous_stage" in chosen:
        raise UserError(
            f"{configuration} is the second stage of a cascade, whose input holds one-hot segmentations that the "
            "encoder never saw: train 3d_fullres or 3d_lowres."
        )
    plans["plans_name"] += settings.suffix()
    if settings.patch_size is not None:
        chosen["patch_size"] = list(settings.patch_size)
    if settings.batch_size is not None:
        chosen["batch_size"] = settings.batch_size
    return plans


def network_entry(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plans' ``architecture`` entry that builds a SwinFPN around the encoder of a checkpoint.

    Channels and classes come from the data set when nnU-Net builds the network; the mask token has no use there.
    """
    encoder = {key: value for key, value in architecture.items() if key not in ("backbone", "in_channels")}
    encoder["mask_token"] = False
    return {"network_class_name": NETWORK, "arch_kwargs": encoder, "_kw_requires_import": []}


def saved_network_entry(output_folder_base: Path | str, configuration: str) -> dict[str, Any]:
    """Return the ``architecture`` entry in the plans saved beside a model's folds.

    Raises:
        UserError: there are no such plans.
    """
    path = Path(output_folder_base) / "plans.json"
    if not path.is_file():
        raise UserError(f"{path} is missing, so the network of the checkpoint beside it is not known.")
    return json.loads(path.read_text())["configurations"][configuration]["architecture"]
