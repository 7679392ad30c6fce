"""Run other commands, nnU-Net's and this package's, so that they end when whoever called them ends."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

PATIENCE_S = 30
"""So long may a command take to save what it has when it is asked to end."""

KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
"""Variables by which glibc keeps the memory that PyTorch gives back at every layer, up to 16 GiB. Otherwise a network
that computes on a CPU waits for fresh pages half of its time (docs/performance.md)."""
SHARED_CORES = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Variables by which threads sleep while they wait for each other, for programs that share a CPU. nnU-Net takes a
thread for every core, whatever OMP_NUM_THREADS says; threads that wait by spinning hold up those for whom they wait."""


def find_program(name: str) -> str:
    """Return the program of this Python's own environment, which need not be activated."""
    if name == "python":
        return sys.executable
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])) or name


def run_command(
    command: Sequence[str],
    log: IO[str],
    variables: Mapping[str, str],
    *,
    kept_open: Sequence[int] = (),
    meanwhile: Callable[[], None] | None = None,
) -> int:
    """Run a command in a process group of its own, which ends with it: a dead training leaves no workers behind.

    Args:
        command: program and arguments.
        log: takes the command's line, its output and its errors.
        variables: added to the environment.
        kept_open: descriptors that the command inherits, such as locks that must outlive this process.
        meanwhile: called about twice a second.

    Returns:
        the exit status; 127 if the program cannot be started.
    """
    log.write(f"$ {shlex.join(command)}\n")
    log.flush()
    environment = {**os.environ, **variables, "PYTHONUNBUFFERED": "1"}
    arguments = [find_program(command[0]), *command[1:]]
    try:
        process = subprocess.Popen(
            arguments, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=kept_open
        )
    except OSError as error:
        log.write(f"{error}\n")
        return 127
    try:
        while meanwhile is not None and process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
            meanwhile()
        return process.wait()
    except BaseException:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
        raise
    finally:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def last_line(log: Path) -> str:
    """The last line of a log that says something, with what a progress bar wrote over counted as lines."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
        lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
