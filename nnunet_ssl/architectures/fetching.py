"""Bring somebody's published encoder to where the fine-tuning trainers look for it."""

from __future__ import annotations

from pathlib import Path

from nnunet_ssl.architectures.pretrained import ENCODER
from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import folder_of


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


def destination(recipe: str, dataset: str) -> Path:
    """Return where a trainer of `recipe` will find the encoder: ``$nnUNet_results/<dataset>/<recipe>/``.

    Raises:
        UserError: an encoder is there already.
    """
    path = folder_of("nnUNet_results") / dataset / recipe / ENCODER
    if path.exists():
        raise UserError(f"There is an encoder at {path} already. Choose another --recipe or -d, or remove it.")
    return path
