"""Run a list of commands that may be interrupted: what is done is marked, what was interrupted is taken up again."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_ssl.demo.steps import Step
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import written_beside

SHOWN_ON_FAILURE = 25  # lines of the log

logger = logging.getLogger(__name__)


def run_steps(steps: Sequence[Step], folder: Path, variables: Mapping[str, str]) -> None:
    """Run what is not done yet with these commands and variables. A step run again takes the marks of all later ones.

    Args:
        steps: in order.
        folder: for the logs and marks.
        variables: added to the environment of every command.

    Raises:
        UserError: a command failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps):
        mark = folder / f"{step.name}.done.json"
        done = _read(mark)
        if done and (done["command"], done.get("variables")) == (list(step.command), dict(variables)):
            logger.info("\n%s\n  done before, in %.0f s", step.title, done["seconds"])
            continue
        for later in steps[number:]:
            (folder / f"{later.name}.done.json").unlink(missing_ok=True)
        seconds = _run(step, folder / f"{step.name}.log", variables)
        with written_beside(mark) as temporary:
            temporary.write_text(json.dumps({"command": step.command, "variables": dict(variables), "seconds": seconds}))


def _run(step: Step, log: Path, variables: Mapping[str, str]) -> float:
    """Run one step, its output in `log` and its last line on the terminal; return the seconds it took."""
    interrupted = log.is_file()
    if interrupted:
        for leftover in step.leftovers:
            shutil.rmtree(leftover, ignore_errors=True)
    command = [*step.command, *(step.continued if interrupted else ())]
    logger.info("\n%s\n$ %s", step.title, shlex.join(command))
    environment = {**os.environ, **variables, "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [find_program(command[0]), *command[1:]], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                time.sleep(0.5)
                _show_progress(log, time.monotonic() - started)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    seconds = time.monotonic() - started
    if sys.stdout.isatty():
        sys.stdout.write("\r\033[K")
    if process.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_ON_FAILURE:])
        raise UserError(f"{last}\n\n'{step.title}' failed with status {process.returncode}; all it said is in {log}.")
    logger.info("  done in %.0f s; its output is in %s", seconds, log)
    return seconds


def find_program(name: str) -> str:
    """Return the program of this Python's own environment, which need not be activated."""
    if name == "python":
        return sys.executable
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])) or name


def _show_progress(log: Path, seconds: float) -> None:
    if not sys.stdout.isatty():
        return
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 400))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    width = shutil.get_terminal_size().columns - 12
    sys.stdout.write(f"\r\033[K  {seconds:4.0f} s  {last[:width]}")
    sys.stdout.flush()


def _read(mark: Path) -> dict | None:
    return json.loads(mark.read_text()) if mark.is_file() else None
