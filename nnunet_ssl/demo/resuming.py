"""Run a list of commands that may be interrupted: what is done is marked, what was interrupted is taken up again."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_ssl.commands import last_line, run_command
from nnunet_ssl.demo.steps import Step
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import written_beside

SHOWN_ON_FAILURE = 25  # lines of the log

logger = logging.getLogger(__name__)


def run_steps(steps: Sequence[Step], folder: Path, variables: Mapping[str, str]) -> None:
    """Run what is not done yet with these commands and variables. A step run again takes the marks of all later ones.

    A step is continued when its last try had the same command and variables and no earlier step was run since.

    Args:
        steps: in order.
        folder: for the logs and marks.
        variables: added to the environment of every command.

    Raises:
        UserError: a command failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps):
        mark, log = folder / f"{step.name}.json", folder / f"{step.name}.log"
        this = {"command": list(step.command), "variables": dict(variables)}
        last = _read(mark)
        seconds = last.pop("seconds", None)
        if last == this and seconds is not None:
            logger.info("\n%s\n  done before, in %.0f s", step.title, seconds)
            continue
        for later in steps[number + 1 :]:
            (folder / f"{later.name}.json").unlink(missing_ok=True)
        more = step.continued if last == this else None
        if log.is_file() and more is None:
            for leftover in step.leftovers:
                shutil.rmtree(leftover, ignore_errors=True)
        _write(mark, this)
        _write(mark, this | {"seconds": _run(step, more or (), log, variables)})


def _run(step: Step, more: Sequence[str], log: Path, variables: Mapping[str, str]) -> float:
    """Run one step with `more` arguments, its output in `log`, its last line on the terminal; return its seconds."""
    command = [*step.command, *more]
    logger.info("\n%s\n$ %s", step.title, shlex.join(command))
    started = time.monotonic()
    with log.open("w") as output:
        status = run_command(
            command, output, variables, meanwhile=lambda: _show_progress(log, time.monotonic() - started)
        )
    seconds = time.monotonic() - started
    if sys.stdout.isatty():
        sys.stdout.write("\r\033[K")
    if status:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_ON_FAILURE:])
        raise UserError(f"{last}\n\n'{step.title}' failed with status {status}; all it said is in {log}.")
    logger.info("  done in %.0f s; its output is in %s", seconds, log)
    return seconds


def _show_progress(log: Path, seconds: float) -> None:
    if not sys.stdout.isatty():
        return
    width = shutil.get_terminal_size().columns - 12
    sys.stdout.write(f"\r\033[K  {seconds:4.0f} s  {last_line(log)[:width]}")
    sys.stdout.flush()


def _read(mark: Path) -> dict[str, Any]:
    """A step's last try: its command and variables, and its seconds when it was finished; empty before the first."""
    return json.loads(mark.read_text()) if mark.is_file() else {}


def _write(mark: Path, content: dict[str, Any]) -> None:
    with written_beside(mark) as temporary:
        temporary.write_text(json.dumps(content))
