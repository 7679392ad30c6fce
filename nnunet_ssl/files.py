"""Write files so that a reader never meets a half-written one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`. No other process may be writing there."""
    for path in folder.glob(".*.partial.*"):
        path.unlink()
