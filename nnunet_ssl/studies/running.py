"""Execute what is missing of a study, one run after another: locked, logged, resumable; a failed run stops no other.

A run's lock is held by its commands too: it stays as long as one of them lives, even when the runner was killed. So
several runners, on one machine or on many, share a study without doing anything twice. Models lie where nnU-Net puts
them, outside the study, so a fold has a lock of its own there, which other studies respect.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nnunet_ssl.commands import last_line, run_command
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import written_beside
from nnunet_ssl.studies.stage import Stage
from nnunet_ssl.studies.stages import stages_of
from nnunet_ssl.studies.study import AnyRun, Study

PAUSE_S = 5
"""How often it is asked whether another runner has made what all that is left here waits for."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """How a run stands, and what there is to know of it."""

    kind: Literal["finished", "running", "queued", "failed", "waiting", "outdated", "missing"]
    detail: str = ""


def state_of(run: AnyRun, study: Study, folder: Path, device: str, queue: frozenset[str] = frozenset()) -> State:
    """Look at a run's files, its lock and its record.

    Args:
        queue: the SLURM jobs that are pending or running.
    """
    try:
        stages = stages_of(run, study, folder, device)
    except UserError as error:
        return State("waiting", str(error))
    if all(stage.is_done() for stage in stages):
        return State("finished")
    if any(map(_is_locked, _locks_of(run, folder, stages))):
        return State("running")
    record = read_record(folder, run)
    if record.get("job") in queue:
        return State("queued", f"SLURM job {record['job']}")
    if record.get("state") == "failed":
        return State("failed", f"{record['stage']}: {record['reason']} (log: {log_of(folder, run)})")
    return State("outdated" if any(stage.made_otherwise() for stage in stages) else "missing")


def execute_all(runs: Sequence[AnyRun], study: Study, folder: Path, device: str) -> list[str]:
    """Execute what is missing of `runs`; return the identifiers of those that failed.

    What another runner works on, or has tried in vain since this call began, is left to it. A run that waits for an
    earlier one is tried again when that is done, by whomever.
    """
    began, failed, ended = time.time(), [], 0
    pending = list(runs)
    while pending:
        others = any(state_of(run, study, folder, device).kind == "running" for run in study.runs())
        left = []
        for run in pending:
            if read_record(folder, run).get("ended_at", 0) > began:
                continue
            each = (time.time() - began) / max(1, ended)
            hours = f" (about {each * (len(runs) - ended) / 3600:.1f} h left)" if ended else ""
            try:
                stages_of(run, study, folder, device)
            except UserError:
                left.append(run)
                continue
            logger.info("[%d/%d] %s%s", ended + 1, len(runs), run.id, hours)
            ended += 1
            if execute(run, study, folder, device) == "failed":
                failed.append(run.id)
        if len(left) == len(pending):
            if not others:
                break
            time.sleep(PAUSE_S)
        pending = left
    return failed


def execute(
    run: AnyRun, study: Study, folder: Path, device: str
) -> Literal["finished", "failed", "left to another runner"]:
    """Do what is missing of one run, and write down how it went.

    Raises:
        UserError: the run cannot begin yet (see :func:`stages_of`).
    """
    paths = _locks_of(run, folder, stages_of(run, study, folder, device))
    with contextlib.ExitStack() as held:
        locks = [lock for path in paths if (lock := held.enter_context(_locked(path, tries=5))) is not None]
        if len(locks) < len(paths):
            logger.info("    left to the runner that works on it")
            return "left to another runner"
        seconds = read_record(folder, run).get("seconds", {})
        stages = stages_of(run, study, folder, device)  # as the runner left it that held a lock until now
        for stage in stages:
            if stage.made_otherwise():
                stage.remove_outputs()
        for place, stage in enumerate(stages):
            if stage.is_done():
                continue
            logger.info("    %s", stage.name)
            _remove_outdated(stage, stages[place + 1 :])
            began = time.monotonic()
            reason = _run_stage(stage, log_of(folder, run), locks)
            seconds[stage.name] = seconds.get(stage.name, 0) + round(time.monotonic() - began)
            if reason:
                logger.warning("    failed: %s; its output is in %s", reason, log_of(folder, run))
                _record_end(folder, run, seconds, state="failed", stage=stage.name, reason=reason)
                return "failed"
        _record_end(folder, run, seconds, state="finished")
        return "finished"


def log_of(folder: Path, run: AnyRun) -> Path:
    """Where the commands of a run write, one after another and try after try."""
    return folder / "logs" / f"{run.id}.log"


def read_record(folder: Path, run: AnyRun) -> dict[str, Any]:
    """What the last try of a run left: its state, the seconds of its stages; empty before the first."""
    path = folder / "runs" / f"{run.id}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def write_record(folder: Path, run: AnyRun, record: dict[str, Any]) -> None:
    """Write down how a run stands."""
    with written_beside(folder / "runs" / f"{run.id}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2))


def _record_end(folder: Path, run: AnyRun, seconds: Mapping[str, int], **how: str) -> None:
    where_and_when = {"host": socket.gethostname(), "ended_at": time.time()}
    write_record(folder, run, how | {"seconds": seconds} | where_and_when)


def _remove_outdated(stage: Stage, later: Sequence[Stage]) -> None:
    """Remove what was made, at first or second hand, of what a stage is about to make anew."""
    made = set(stage.outputs)
    for one in later:
        if made.intersection(one.inputs):
            one.remove_outputs()
            made.update(one.outputs)


def _run_stage(stage: Stage, log: Path, locks: Sequence[int]) -> str | None:
    """Run one command with its output in `log`; return why it failed, or None."""
    if stage.unfinished is not None:
        shutil.rmtree(stage.unfinished, ignore_errors=True)
    for path in (log, *(stage.outputs if stage.lock is None else ())):
        path.parent.mkdir(parents=True, exist_ok=True)
    after = stage.note in stage.outputs
    if stage.note is not None and not after:
        stage.note.write_text(stage.noted)
    with log.open("a") as output:
        output.write("\n")
        status = run_command(stage.command, output, stage.variables, kept_open=locks)
    if status:
        return f"status {status}: {last_line(log) or 'no output'}"
    if stage.unfinished is not None:
        stage.remove_outputs()
        stage.unfinished.rename(stage.outputs[0])
    if stage.note is not None and after:
        stage.note.write_text(stage.noted)
    missing = [str(path) for path in stage.outputs if not path.exists()]
    return f"it ended well and left no {missing[0]}" if missing else None


def _locks_of(run: AnyRun, folder: Path, stages: Sequence[Stage]) -> list[Path]:
    """The lock of the run in its study, and that of its fold while something is missing there, which may be another
    study's work as well; a finished fold may be somebody else's, and only readable."""
    folds = {stage.lock for stage in stages if stage.lock is not None and not stage.is_done()}
    return [folder / "runs" / f"{run.id}.lock", *folds]


@contextlib.contextmanager
def _locked(path: Path, tries: int = 1) -> Iterator[int | None]:
    """Yield the open lock, or None when someone else holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield descriptor if _lock(descriptor, tries) else None
    finally:
        os.close(descriptor)


def _lock(descriptor: int, tries: int) -> bool:
    """Several tries, because someone who only looks whether a run is locked holds its lock for a moment."""
    for remaining in reversed(range(tries)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1 * (remaining > 0))
        else:
            return True
    return False


def _is_locked(path: Path) -> bool:
    if not path.is_file():
        return False
    with _locked(path) as lock:
        return lock is None
