"""nnU-Net's three folders and the data sets in them, with errors a user can act on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from nnunet_ssl.errors import UserError

Variable = Literal["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"]


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
    if str(dataset).startswith("Dataset"):
        found = [path for path in [root / str(dataset)] if path.is_dir()]
    elif str(dataset).isdigit():
        found = folders_with_id(root, int(dataset))
    else:
        raise UserError(f"'{dataset}' is neither a data set id (500) nor a data set name (Dataset500_FOMO60K).")
    if len(found) > 1:
        raise UserError(f"More than one data set has the id {dataset} in {root}: {', '.join(p.name for p in found)}.")
    if not found:
        present = ", ".join(sorted(path.name for path in root.glob("Dataset*"))) or "none"
        raise UserError(f"There is no data set {dataset} in {variable} ({root}). Data sets there: {present}.")
    return found[0]


def folders_with_id(root: Path, number: int) -> list[Path]:
    """Return the folders under `root` of the data sets with an id, by name; nnU-Net allows only one."""
    return sorted(path for path in root.glob(f"Dataset{number:03d}_*") if path.is_dir())
