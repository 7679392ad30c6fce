"""The journal of a store: which sessions are finished, and from which inputs; a line is added as each one ends."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from nnunet_ssl.corpus.prepared import DATA_IDENTIFIER, PLANS_NAME
from nnunet_ssl.corpus.session import ScanTask, SessionResult, SessionTask
from nnunet_ssl.corpus.store import SUFFIXES
from nnunet_ssl.files import written_beside

JOURNAL = f"{PLANS_NAME}_journal.jsonl"

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


def finished_sessions(folder: Path, tasks: Sequence[SessionTask]) -> dict[str, SessionResult]:
    """The sessions that need no work: journalled from the same inputs, with nothing to try again, all files there."""
    fingerprints = {task.session: task.fingerprint for task in tasks}
    present = {path.name for path in (folder / DATA_IDENTIFIER).iterdir()}
    done, changed = {}, 0
    for result in _read_journal(folder):
        if result.session not in fingerprints:
            continue
        same = result.fingerprint == fingerprints[result.session]
        changed += not same
        complete = all(row["scan_id"] + suffix in present for row in result.rows for suffix in SUFFIXES)
        if same and complete and not result.transient:
            done[result.session] = result
        else:
            done.pop(result.session, None)
    if changed:
        logger.info("The images of %d sessions changed since they were prepared; these are prepared again.", changed)
    return done


def _read_journal(folder: Path) -> Iterator[SessionResult]:
    """The journal's entries, in the order written. A last line without an end was cut off by a kill: it is no entry."""
    path = folder / JOURNAL
    if not path.is_file():
        return
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):
                yield SessionResult(**json.loads(line))


def write_journal(folder: Path, results: Iterable[SessionResult]) -> None:
    """Write the journal anew."""
    with written_beside(folder / JOURNAL) as temporary:
        temporary.write_text("".join(map(_line, results)))


@contextmanager
def open_journal(folder: Path) -> Iterator[Callable[[SessionResult], None]]:
    """Yield a function that adds a result to the journal, and returns when it is safe on the disk."""
    with (folder / JOURNAL).open("a") as journal:

        def add(result: SessionResult) -> None:
            journal.write(_line(result))
            journal.flush()
            os.fsync(journal.fileno())

        yield add


def _line(result: SessionResult) -> str:
    return f"{json.dumps(asdict(result))}\n"
