"""Bring somebody's published encoder to where the fine-tuning trainers look for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from nnunet_ssl.errors import UserError, one_line, require
from nnunet_ssl.nnunet_folders import folder_of
from nnunet_ssl.weights.pretrained import ENCODER
from nnunet_ssl.weights.zoo import ZooEntry, folder_for

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
"""Of files that may be checkpoints."""

HUB_PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repository>[^/?#]+/[^/?#]+)"
    r"(?:/(?:tree|blob|resolve|raw)/(?P<revision>[^/?#]+)(?:/(?P<path>[^?#]+))?)?/?(?:[?#].*)?",
    re.IGNORECASE,
)
"""The address of a repository of Hugging Face, or of a branch, folder or file in it."""


def locate(source: str, filename: str | None, revision: str | None) -> Path:
    """Return the path of a file of a Hugging Face repository, downloaded if need be, or of a local folder.

    Args:
        source: a local file or folder, or else a repository's id, or a web address of it or of something in it.
        filename: the file's path inside the folder or the repository; None where it holds one checkpoint only.
        revision: branch, tag or commit of the repository.

    Raises:
        UserError: there is no such file, several may be meant, or it cannot be downloaded.
    """
    local = Path(source).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        names = [path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()]
        return local / (filename or _the_checkpoint(names, source))
    if "://" in source or HUB_PAGE.fullmatch(source):
        source, folder, told = _of_page(source)
        if revision is not None and told not in (None, revision):
            raise UserError(f"The address names the revision {told}, and --revision {revision}.")
        revision = revision or told
        if folder.endswith(SUFFIXES) and filename is None:
            filename, folder = folder, ""
    else:
        folder = ""
    return _download(source, folder, filename, revision)


def locate_entry(entry: ZooEntry, revision: str | None) -> Path:
    """Return the file of published weights: brought by hand to their folder, or downloaded.

    Raises:
        UserError: it is not there and cannot be downloaded; says which file to bring, and where to put it. Or it was
            brought, and a revision is asked for, which a file does not tell.
    """
    brought = folder_for(entry.name) / Path(entry.file).name
    if brought.is_file():
        if revision is not None:
            raise UserError(
                f"{brought} does not tell its revision: leave out --revision {revision}, or remove the file."
            )
        return brought
    try:
        return _download(entry.repository, "", entry.file, revision or entry.revision)
    except UserError as error:
        raise UserError(
            f"{error} Without a network, download {entry.address} elsewhere, put it at {brought}, and run this again."
        ) from error


def _of_page(address: str) -> tuple[str, str, str | None]:
    """Return the repository's id, the path inside it and the revision that an address names."""
    match = HUB_PAGE.fullmatch(address)
    if match is None or match["repository"].startswith(("datasets/", "spaces/")):
        raise UserError(
            f"{address} is no address of a model on huggingface.co, such as https://huggingface.co/OWNER/NAME. "
            "Download the file, and give its path."
        )
    path = (match["path"] or "").strip("/")
    return (
        unquote(match["repository"]).removesuffix(".git"),
        unquote(path),
        match["revision"] and unquote(match["revision"]),
    )


def _download(repository: str, folder: str, filename: str | None, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    start = f"{folder}/" if folder else ""
    if filename is None:
        with _hub_errors(repository, "the list of its files"):
            names = HfApi().list_repo_files(repository, revision=revision)
        filename = _the_checkpoint([name for name in names if name.startswith(start)], repository)
    elif not filename.startswith(start):
        filename = start + filename
    with _hub_errors(repository, filename):
        return Path(hf_hub_download(repository, filename, revision=revision))


@contextmanager
def _hub_errors(repository: str, what: str) -> Iterator[None]:
    """Turn any error of the download into the user's: a missing file, no right, no network, no such name."""
    try:
        yield
    except Exception as error:  # huggingface_hub passes on those of the package that it speaks HTTP with
        raise UserError(
            f"{repository} is no local path, and {what} cannot be downloaded from huggingface.co/{repository}: "
            f"{one_line(error)}"
        ) from error


def _the_checkpoint(names: list[str], source: str) -> str:
    """Return the only name of a checkpoint among the names of files."""
    checkpoints = sorted(name for name in names if name.endswith(SUFFIXES))
    if len(checkpoints) != 1:
        shown = ", ".join(checkpoints[:8]) + (", ..." if len(checkpoints) > 8 else "")
        raise UserError(
            f"{source} holds {len(checkpoints)} files that may be the checkpoint{': ' + shown if shown else ''}. "
            "Name the file to take behind it."
        )
    return checkpoints[0]


def destination(recipe: str, dataset: str) -> Path:
    """Return where a trainer of `recipe` will find the encoder: ``$nnUNet_results/<dataset>/<recipe>/``.

    Args:
        recipe: such as ``mcl_mim``.
        dataset: its full name.

    Raises:
        UserError: an encoder is there already, or `recipe`, which may come from a file's header, is no name.
    """
    require(
        re.fullmatch(r"\w[\w.-]*", recipe) is not None,
        f"'{recipe}' is no name of a recipe, which becomes a folder: say another with --recipe",
    )
    path = folder_of("nnUNet_results") / dataset / recipe / ENCODER
    if path.exists():
        raise UserError(f"There is an encoder at {path} already. Choose another --recipe or -d, or remove it.")
    return path
