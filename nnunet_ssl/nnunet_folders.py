"""nnU-Net's three folders and the data sets in them, with errors a user can act on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from nnunet_ssl.errors import UserError

PLANS_NAME = "nnUNetSSLPlans"
"""The name of the plans that this package writes: those of a pre-training store, and those of ``nnssl_plan``."""

CONFIGURATION = "3d_fullres"
"""The configuration of nnU-Net that has them."""

FORMER_PLANS_NAME = "nnsslPlans"
"""The same in version 0.1.0. MIC-DKFZ/nnssl calls its plans so, too; what was begun with them keeps the name."""

RECORDS = ("conversion", "cases")
"""Where a conversion keeps its records, a file for each case, below the folder that it writes."""

Variable = Literal["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"]


def channel_names(dataset: Mapping[str, Any]) -> list[str]:
    """Return the names of the channels, in their order, that a dataset.json has; nnU-Net takes its former key, too."""
    return [str(name) for name in (dataset.get("modality") or dataset["channel_names"]).values()]


def folder_of(variable: Variable) -> Path:
    """Return the folder that `variable` names.

    Raises:
        UserError: the variable is not set.
    """
    value = os.environ.get(variable)
    if not value:
        raise UserError(
            f"The environment variable {variable} is not set. nnU-Net keeps its files in three folders; "
            f"set all three, for example: export {variable}=/data/{variable}"
        )
    return Path(value)


def dataset_folder(dataset: int | str, variable: Variable) -> Path:
    """Return the folder of a data set, given by id (500) or name (Dataset500_FOMO60K), under one of the three roots.

    Raises:
        UserError: the variable is not set, or there is no such data set, or more than one has the id.
    """
    root = folder_of(variable)
    found = [root / str(dataset)] if _is_name(dataset) else folders_with_id(root, int(dataset))
    found = [path for path in found if path.is_dir()]
    if len(found) > 1:
        raise UserError(f"More than one data set has the id {dataset} in {root}: {', '.join(p.name for p in found)}.")
    if not found:
        present = ", ".join(sorted(path.name for path in root.glob("Dataset*"))) or "none"
        raise UserError(f"There is no data set {dataset} in {variable} ({root}). Data sets there: {present}.")
    return found[0]


def folders_with_id(root: Path, number: int) -> list[Path]:
    """Return the folders under `root` of the data sets with an id, by name; nnU-Net allows only one."""
    return sorted(path for path in root.glob(f"Dataset{number:03d}_*") if path.is_dir())


def new_dataset_folder(number: int, name: str) -> Path:
    """Return the folder ``$nnUNet_raw/DatasetXXX_NAME``, which need not exist.

    Raises:
        UserError: the number belongs to another data set already, or isn't between 1 and 999.
    """
    if not 0 < number < 1000:
        raise UserError(f"nnU-Net's data set numbers have three digits; {number} is not one of them.")
    root = folder_of("nnUNet_raw")
    folder = root / f"Dataset{number:03d}_{name}"
    others = [path.name for path in folders_with_id(root, number) if path != folder]
    if others:
        raise UserError(f"The number {number} belongs to {others[0]} in {root} already. Choose another with -d.")
    return folder


def full_name(dataset: str) -> str:
    """Return the name of a data set, which need not exist, or of the one with an id (500) in any of nnU-Net's folders.

    Raises:
        UserError: `dataset` is neither, or no data set or more than one has the id.
    """
    if _is_name(dataset):
        return dataset
    roots = [Path(os.environ[variable]) for variable in get_args(Variable) if os.environ.get(variable)]
    names = sorted({path.name for root in roots for path in folders_with_id(root, int(dataset))})
    if len(names) != 1:
        raise UserError(
            f"Data sets with the id {dataset} in nnU-Net's folders: {', '.join(names) or 'none'}. "
            "Give the full name, for example: -d Dataset500_FOMO60K"
        )
    return names[0]


def dataset_id(name: str) -> int:
    """500 of ``Dataset500_FOMO60K``."""
    return int(name.removeprefix("Dataset").split("_")[0])


def _is_name(dataset: int | str) -> bool:
    """Tell a data set's name from an id.

    Raises:
        UserError: it is neither.
    """
    if str(dataset).startswith("Dataset"):
        return True
    if not str(dataset).isdecimal():
        raise UserError(f"'{dataset}' is neither a data set id (500) nor a data set name (Dataset500_FOMO60K).")
    return False
