"""One command of a study's runs, and the files that prove that it is done."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NOTE = "command.txt"
"""Beside the results of an evaluation or a measurement: of which command they are; of an arm's models: their start."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of a run.

    Attributes:
        name: make, pretrain, train, predict, evaluate or measure.
        command: program and arguments.
        outputs: the files or folders that are there when it is done.
        inputs: what they are made from, as far as it can change: what an earlier stage writes, or a checkpoint.
        variables: added to the environment.
        unfinished: where the command writes what is renamed to the first output when it has succeeded.
        lock: beside the folder of a fold, which studies share; None for what lies in this study alone.
        note: where the runner writes down what the outputs are of, before the command runs, or after it if the note is
            the output: if nothing else tells that it is done. Without a note, the outputs alone count.
        noted: what it writes there.
    """

    name: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    inputs: tuple[Path, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    unfinished: Path | None = None
    lock: Path | None = None
    note: Path | None = None
    noted: str = ""

    def is_done(self) -> bool:
        """Tell whether the outputs are there, none is older than an input, and no other command made them."""
        try:
            made = min(path.stat().st_mtime_ns for path in self.outputs)
            return all(path.stat().st_mtime_ns <= made for path in self.inputs) and not self.made_otherwise()
        except FileNotFoundError:
            return False

    def made_otherwise(self) -> str:
        """Return what the outputs, which are there, are of, if it is not what they are to be of; else ""."""
        if self.note is None or not self.note.is_file() or not all(path.exists() for path in self.outputs):
            return ""
        found = self.note.read_text()
        return found if found != self.noted else ""

    def remove_outputs(self) -> None:
        for path in self.outputs:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def within(folder: Path, command: Sequence[str]) -> str:
    """A command as it stays when the study is moved."""
    return shlex.join(command).replace(str(folder), "$study")
