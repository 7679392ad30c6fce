"""Checkpoints that survive a kill: written whole or not at all, the last few kept, a damaged one passed over."""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import written_beside

LATEST = "checkpoint_latest.pth"
FINAL = "checkpoint_final.pth"

logger = logging.getLogger(__name__)


def save(folder: Path, state: Mapping[str, Any], *, step: int, keep: int) -> None:
    """Write ``checkpoint_<step>.pth``, let ``checkpoint_latest.pth`` be the same file, drop all but the last `keep`.

    Args:
        folder: of the run.
        state: tensors and plain types, so that ``torch.load(weights_only=True)`` reads it.
        step: number of steps done.
        keep: checkpoints to keep.
    """
    path = folder / f"checkpoint_{step:08d}.pth"
    with written_beside(path) as temporary:
        torch.save(dict(state), temporary)
    share(path, folder / LATEST)
    for old in numbered(folder)[keep:]:
        old.unlink()


def share(source: Path, target: Path) -> None:
    """Let `target` be `source`, at once: a hard link, or a copy where the file system has no links."""
    with written_beside(target) as temporary:
        temporary.unlink(missing_ok=True)  # a killed run's, which may be a link to another checkpoint
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of `folder`, the newest first."""
    return sorted(folder.glob("checkpoint_[0-9]*.pth"), reverse=True)


def load(folder: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint that is whole; None when there is no checkpoint at all. Tensors lie on the CPU.

    Raises:
        UserError: there are checkpoints and none of them can be read.
    """
    candidates = [path for path in (folder / LATEST, *numbered(folder)) if path.is_file()]
    for path in candidates:
        try:
            state = _read(path)
        except Exception as error:  # torch raises anything from EOFError to RuntimeError for a damaged file
            logger.warning("%s cannot be read (%s): trying the one before.", path, error)
        else:
            logger.info("Read %s (step %d).", path, state["step"])
            return state
    if candidates:
        raise UserError(
            f"None of the checkpoints in {folder} can be read. Start anew: remove the folder, or leave out --c and "
            "choose another name with --set recipe=..."
        )
    return None


def _read(path: Path) -> dict[str, Any]:
    """Read a checkpoint, checksums first: ``torch.load`` does not look at them."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise OSError(f"the checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)
