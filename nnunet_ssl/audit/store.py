"""Fingerprints of many scans, made once: in several processes, kept in files that an interruption does not spoil."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_ssl.audit.fingerprints import Fingerprint, fingerprint
from nnunet_ssl.corpus.workers import run_locally
from nnunet_ssl.errors import one_line
from nnunet_ssl.files import remove_leftovers, written_beside
from nnunet_ssl.imaging.geometry import read_scan
from nnunet_ssl.live import live_line

FORMAT = 1
"""Raised when fingerprints change, so that older ones are made anew."""

_AT_A_TIME = 200

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prints:
    """Fingerprints by path, and by path the reasons why others have none."""

    found: dict[str, Fingerprint]
    failed: dict[str, str]


def fingerprints_of(paths: Iterable[Path], folder: Path, processes: int) -> Prints:
    """Return the fingerprints of scans, from `folder` where they were made earlier and the files are the same since."""
    stamps = {str(path): _stamp(path) for path in dict.fromkeys(paths)}
    remove_leftovers(folder)
    kept = _kept(folder, stamps)
    waiting = [path for path in stamps if path not in kept]
    failed, fresh = {}, {}
    outcomes = run_locally(_fingerprint_of, waiting, processes)
    with live_line(
        f"Fingerprints of {folder.name}", len(stamps), unit="scan", done=len(kept), shown=bool(waiting)
    ) as line:
        for path, outcome in outcomes:
            if isinstance(outcome, BaseException):
                failed[path] = one_line(outcome)
            else:
                fresh[path] = outcome
            if len(fresh) == _AT_A_TIME:
                _keep(folder, fresh, stamps)
                kept, fresh = kept | fresh, {}
            line.set_postfix({"not compared": len(failed)}, refresh=False)
            line.update()
    if fresh:
        _keep(folder, fresh, stamps)
    return Prints(kept | fresh, failed)


def _fingerprint_of(path: str) -> Fingerprint:
    return fingerprint(read_scan(path))


def _stamp(path: Path) -> str:
    """What tells that a file is another than it was; what is no file has none that stays."""
    try:
        status = path.stat()
    except OSError:
        return "missing"
    return f"{FORMAT} {status.st_size} {status.st_mtime_ns}"


def _kept(folder: Path, stamps: dict[str, str]) -> dict[str, Fingerprint]:
    found: dict[str, Fingerprint] = {}
    for file in sorted(folder.glob("[!.]*.npz")):
        with np.load(file, allow_pickle=False) as part:
            entries = zip(part["paths"].tolist(), part["stamps"].tolist(), part["values"], part["matrices"])
            found |= {
                path: Fingerprint(values, matrix)
                for path, stamp, values, matrix in entries
                if stamps.get(path) == stamp
            }
    return found


def _keep(folder: Path, fresh: dict[str, Fingerprint], stamps: dict[str, str]) -> None:
    number = len(list(folder.glob("[!.]*.npz")))
    paths = list(fresh)
    with written_beside(folder / f"{number:05d}.npz") as path:
        np.savez(
            path,
            paths=np.array(paths),
            stamps=np.array([stamps[name] for name in paths]),
            values=np.stack([fresh[name].values for name in paths]),
            matrices=np.stack([fresh[name].matrix for name in paths]),
        )
