"""Bring somebody's published encoder to where the fine-tuning trainers look for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

from nnunet_ssl.architectures.pretrained import ENCODER
from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import Variable, folder_of, folders_with_id


def locate(source: str, filename: str | None, revision: str | None) -> Path:
    """Return the path of a file of a Hugging Face repository, downloaded if need be, or of a local folder.

    Args:
        source: a local file or folder, or else a repository's id.
        filename: the file's path inside the folder or the repository.
        revision: branch, tag or commit of the repository.

    Raises:
        UserError: there is no such file, or it cannot be downloaded.
    """
    local = Path(source).expanduser()
    if local.is_file():
        return local
    if filename is None:
        raise UserError(f"{source} is no local file: name the file to take from this folder or repository.")
    if local.is_dir():
        return local / filename
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, filename, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{source} is no local path, and {filename} cannot be downloaded from huggingface.co/{source}: {reason}"
        ) from error


def full_name(dataset: str) -> str:
    """Return the name of a data set, which need not exist, or of the one with an id (500) in any of nnU-Net's folders.

    Raises:
        UserError: `dataset` is neither, or no data set or more than one has the id.
    """
    if dataset.startswith("Dataset"):
        return dataset
    if not dataset.isdecimal():
        raise UserError(f"'{dataset}' is neither a data set id (500) nor a data set name (Dataset500_FOMO60K).")
    roots = [Path(os.environ[variable]) for variable in get_args(Variable) if os.environ.get(variable)]
    names = sorted({path.name for root in roots for path in folders_with_id(root, int(dataset))})
    if len(names) != 1:
        raise UserError(
            f"Data sets with the id {dataset} in nnU-Net's folders: {', '.join(names) or 'none'}. "
            "Give the full name, for example: -d Dataset500_FOMO60K"
        )
    return names[0]


def destination(recipe: str, dataset: str) -> Path:
    """Return where a trainer of `recipe` will find the encoder: ``$nnUNet_results/<dataset>/<recipe>/``.

    Args:
        recipe: such as ``mcl_mim``.
        dataset: its full name.

    Raises:
        UserError: an encoder is there already.
    """
    path = folder_of("nnUNet_results") / dataset / recipe / ENCODER
    if path.exists():
        raise UserError(f"There is an encoder at {path} already. Choose another --recipe or -d, or remove it.")
    return path
