"""The journal of a store: which sessions are finished, and from which inputs; a line is added as each one ends."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from nnunet_ssl.corpus.naming import StoreNames
from nnunet_ssl.corpus.session import ScanTask, SessionResult, SessionTask
from nnunet_ssl.corpus.store import SUFFIXES, is_whole, remove_case
from nnunet_ssl.files import written_beside

logger = logging.getLogger(__name__)


def fingerprint(scans: Sequence[ScanTask], options: str) -> str:
    """Stand for everything a session's stored arrays depend on; a file by its size and its time of change."""
    digest = hashlib.blake2b(options.encode(), digest_size=16)
    for scan in scans:
        try:
            status = Path(scan.path).stat()
            state = (status.st_size, status.st_mtime_ns)
        except OSError:
            state = None
        digest.update(repr((scan.scan_id, scan.modality, scan.stripped, state)).encode())
    return digest.hexdigest()


def finished_sessions(names: StoreNames, tasks: Sequence[SessionTask]) -> dict[str, SessionResult]:
    """The sessions that need no work: journalled from the same inputs, with nothing to try again, all files whole.

    A file is whole if it has the size that the journal recorded, or the length that it names itself where an older
    journal recorded none. What is left of a damaged case is removed, so that the case is made again.
    """
    fingerprints = {task.session: task.fingerprint for task in tasks}
    store = names.cases
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(store) if entry.is_file()}
    done, damaged, changed = {}, [], 0
    for session, result in {result.session: result for result in _read_journal(names.journal)}.items():
        if session not in fingerprints:
            continue
        if result.fingerprint != fingerprints[session]:
            changed += 1
        elif not result.transient:
            scans = [row["scan_id"] for row in result.rows if not _is_intact(store, row["scan_id"], result, sizes)]
            damaged += scans
            if not scans:
                done[session] = result
    if changed:
        logger.info("The images of %d sessions changed since they were prepared; these are prepared again.", changed)
    if damaged:
        logger.warning(
            "The stored files of %d scans are missing or damaged, such as those of %s; they are made again.",
            len(damaged), damaged[0],
        )  # fmt: skip
    for scan_id in damaged:
        remove_case(store / scan_id)
    return done


def _is_intact(store: Path, scan_id: str, result: SessionResult, sizes: Mapping[str, int]) -> bool:
    """Compare a case's files with what the journal recorded of them, or record it, once they are known to be whole."""
    found = [sizes[scan_id + suffix] for suffix in SUFFIXES if scan_id + suffix in sizes]
    if scan_id not in result.sizes and is_whole(store / scan_id):
        result.sizes[scan_id] = found
    return found == result.sizes.get(scan_id)


def _read_journal(path: Path) -> Iterator[SessionResult]:
    """The journal's entries, in the order written. A line that a kill cut off, or that is damaged, is no entry."""
    if not path.is_file():
        return
    with path.open(errors="replace") as file:
        for line in file:
            with suppress(ValueError, TypeError):
                yield SessionResult(**json.loads(line))


def write_journal(path: Path, results: Iterable[SessionResult]) -> None:
    """Write the journal anew."""
    with written_beside(path) as temporary:
        temporary.write_text("".join(map(_line, results)))


@contextmanager
def open_journal(path: Path) -> Iterator[Callable[[SessionResult], None]]:
    """Yield a function that adds a result to the journal, and returns when it is safe on the disk."""
    with path.open("a") as journal:

        def add(result: SessionResult) -> None:
            journal.write(_line(result))
            journal.flush()
            os.fsync(journal.fileno())

        yield add


def _line(result: SessionResult) -> str:
    return f"{json.dumps(asdict(result))}\n"
