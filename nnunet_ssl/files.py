"""Write files so that a reader never meets a half-written one, nor a folder that two processes write."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from nnunet_ssl.errors import UserError

logger = logging.getLogger(__name__)

LOCK_PATIENCE_S = 10.0
"""How long a lock is waited for: forked workers hold that of a killed process until they notice, PyTorch's within 5 s
(filelock before 4)."""


@contextmanager
def written_beside(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; when the block succeeds, flush it to disk and rename it.

    The temporary name keeps the suffix of `path` (libraries choose a format by it) and starts with a dot, so no
    ``*.nii.gz`` or ``*.b2nd`` listing takes it for a result. When the block raises, the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, command: str) -> Iterator[None]:
    """Let one process at a time work on `folder`, which is made; the lock falls with its process, even by kill -9, and
    with the workers that it has forked.

    Raises:
        UserError: another one is at work, by the name of its `command`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / f".{command}.lock")
    try:
        lock.acquire(timeout=LOCK_PATIENCE_S)
    except filelock.Timeout as error:
        raise UserError(f"Another {command} is at work on {folder}. Wait for it, or stop it.") from error
    except NotImplementedError:
        logger.warning("%s lies on a file system without locks: see to it yourself that one run works on it.", folder)
    try:
        yield
    finally:
        lock.release()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`. No other process may be writing there."""
    for path in folder.glob(".*.partial.*"):
        path.unlink()
