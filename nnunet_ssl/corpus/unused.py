"""The images in a corpus' folder that no rule of its layout reads: found, so that none is lost in silence."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from nnunet_ssl.corpus.layouts import IMAGE

_NUMBERED = re.compile(r"^(sub|ses)([-_]).*$", re.IGNORECASE)
_GROUPS_NAMED = 5


def unused_images(source: Path, used: Iterable[str]) -> list[str]:
    """List the NIfTI files below `source` that are not in `used`, by their paths below it, sorted.

    Hidden folders are not entered. Links to folders are followed; each folder is entered once.
    """
    places: dict[str, str] = {}  # folders without links, so that one file is known on whatever way it was found

    def place(folder: str, name: str) -> tuple[str, str]:
        if folder not in places:
            places[folder] = os.path.realpath(folder)
        return places[folder], name

    known = {place(*os.path.split(path)) for path in used}
    unused, entered = [], set()
    for folder, folders, files in os.walk(source, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        unused += [
            Path(folder, name).relative_to(source).as_posix()
            for name in files
            if IMAGE.match(name) and (real, name) not in known
        ]
    return sorted(unused)


def describe_unused(paths: Sequence[str]) -> str:
    """Say how many files were not used, and where they lie: `sub-*/func` stands for this folder of all subjects."""
    groups = defaultdict(list)
    for path in paths:
        folders = path.split("/")[:-1]
        groups["/".join(_NUMBERED.sub(r"\1\2*", name) for name in folders) or "the corpus' folder"].append(path)
    largest = sorted(groups, key=lambda name: -len(groups[name]))
    clauses = [f"{len(groups[name])} in {name}, such as {groups[name][0]}" for name in largest[:_GROUPS_NAMED]]
    rest = sum(len(groups[name]) for name in largest[_GROUPS_NAMED:])
    if rest:
        clauses.append(f"{rest} in {len(largest) - _GROUPS_NAMED} other folders")
    return f"{len(paths)} NIfTI files were not used: {'; '.join(clauses)}"
