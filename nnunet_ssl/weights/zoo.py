"""Published encoders by short names, from the table zoo.yaml: what they are, and where they lie once fetched."""

from __future__ import annotations

import difflib
import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import folder_of
from nnunet_ssl.weights.pretrained import ENCODER, encoder_file

TABLE = Path(__file__).with_name("zoo.yaml")

FOLDER = "zoo"
"""Under ``$nnUNet_results``: fetched encoders, a folder each by their names."""

_FREE = ("CC0", "CC-BY-4.0", "CC-BY-SA-4.0", "APACHE-2.0", "MIT", "BSD")


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """One published encoder.

    Attributes:
        name: what commands call it.
        repository: on Hugging Face.
        file: inside it.
        revision: of the repository.
        origin: whose layout the file has, a key of :data:`nnunet_ssl.weights.origins.READERS`.
        backbone: and its size, in words.
        method: of its pre-training, in words.
        corpus: that it was trained on; a key of the audit's table where more is known of it.
        licence: as stated by its authors; None where none was found.
        size: of the file in bytes, where known.
        verified: "layout" where a replica of the file is read in the tests, "stated" where its layout was only read of.
        merging: of a Swin encoder whose file does not tell it.
        recipe: of this package that made such weights.
        refused: why it cannot be used here; None if it can.
        sources: where all this is said.
    """

    name: str
    repository: str
    file: str
    origin: str
    backbone: str
    method: str
    corpus: str
    licence: str | None
    verified: Literal["layout", "stated"]
    sources: tuple[str, ...]
    revision: str = "main"
    size: int | None = None
    merging: str | None = None
    recipe: str | None = None
    refused: str | None = None

    @property
    def address(self) -> str:
        """Where a browser downloads the file."""
        return f"https://huggingface.co/{self.repository}/resolve/{self.revision}/{self.file}"

    @property
    def is_restricted(self) -> bool:
        """Tell whether the licence is unstated, or none that lets everybody use the weights."""
        return self.licence is None or not self.licence.upper().startswith(_FREE)

    def as_metadata(self) -> dict[str, Any]:
        """What an imported encoder carries on of its entry, in JSON's types."""
        kept = ("name", "repository", "file", "revision", "corpus", "licence", "sources")
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if key in kept
        }


@functools.cache
def entries() -> dict[str, ZooEntry]:
    """The table, by name."""
    table = yaml.safe_load(TABLE.read_text())
    return {name: ZooEntry(name=name, **{**entry, "sources": tuple(entry["sources"])}) for name, entry in table.items()}


def entry_of(name: str) -> ZooEntry:
    """Return the entry of that name.

    Raises:
        UserError: there is none; the nearest are named.
    """
    if name not in entries():
        near = difflib.get_close_matches(name, entries(), n=3, cutoff=0.4)
        raise UserError(
            f"There are no published weights '{name}' in the table"
            f"{'; near it: ' + ', '.join(near) if near else ''}. All of them: nnssl_weights list"
        )
    return entries()[name]


def folder_for(name: str) -> Path:
    """Return where the file of an entry belongs: as it was downloaded, and as the encoder made from it."""
    return folder_of("nnUNet_results") / FOLDER / name


def fetched(name: str) -> Path:
    """Return the encoder of an entry that was fetched.

    Raises:
        UserError: it was not, or cannot be used.
    """
    entry = entry_of(name)
    if entry.refused:
        raise UserError(f"{name} cannot be used: {entry.refused}.")
    path = folder_for(name) / ENCODER
    if not path.is_file():
        raise UserError(f"{name} was not fetched yet, there is no {path}. Fetch it: nnssl_weights fetch {name}")
    return path


def named_checkpoint(name: str) -> Path:
    """Return the file that a path, a folder of a finished pre-training or a name of published weights stands for.

    Raises:
        UserError: published weights have that name, and were not fetched.
    """
    path = encoder_file(Path(name).expanduser())
    return fetched(name) if not path.exists() and name in entries() else path


def describe_licence(entry: ZooEntry) -> str:
    """Say in a line under which licence weights are, and that nobody promises what is not stated."""
    if entry.licence is None:
        return f"LICENCE of {entry.name}: none was found stated, so ask its authors what you may do: {entry.sources[0]}"
    note = " Read it before you use or pass on the weights:" if entry.is_restricted else ""
    return f"LICENCE of {entry.name}: {entry.licence}.{note} https://huggingface.co/{entry.repository}"


def describe_entries() -> str:
    """Return the table as lines for a terminal."""
    header = ("name", "backbone", "method", "corpus", "licence", "size", "verified")
    rows = [
        (
            entry.name,
            entry.backbone,
            entry.method,
            entry.corpus,
            entry.licence or "unstated",
            f"{entry.size / 1e6:.0f} MB" if entry.size else "?",
            f"no: {entry.refused}" if entry.refused else entry.verified,
        )
        for entry in entries().values()
    ]
    widths = [min(max(len(row[column]) for row in (header, *rows)), 44) for column in range(len(header) - 1)]
    lines = [
        "  ".join([*(text[:width].ljust(width) for text, width in zip(row, widths)), row[-1]])
        for row in (header, *rows)
    ]
    return "\n".join(
        [
            *lines,
            "",
            "No file of these was opened to write this table. verified: layout = a replica of the layout, built from",
            "the public code, is read in the tests; stated = the layout is what its source says.",
            "Repositories, files and sources: nnssl_weights list NAME.    To use one: nnssl_weights fetch NAME",
        ]
    )


def describe_entry(entry: ZooEntry) -> str:
    """Return all that the table says of an entry."""
    values = {key: value for key, value in asdict(entry).items() if value not in (None, ())}
    lines = [f"{key:<11} {', '.join(value) if isinstance(value, tuple) else value}" for key, value in values.items()]
    return "\n".join([*lines, describe_licence(entry)])
