"""What the files of a store are called: by its plans, which had another name in 0.1.0."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import CONFIGURATION, FORMER_PLANS_NAME, PLANS_NAME


@dataclass(frozen=True)
class StoreNames:
    """Where the parts of a store lie in the folder of its data set."""

    folder: Path
    plans_name: str = PLANS_NAME

    @property
    def data_identifier(self) -> str:
        return f"{self.plans_name}_{CONFIGURATION}"

    @property
    def plans(self) -> Path:
        return self.folder / f"{self.plans_name}.json"

    @property
    def cases(self) -> Path:
        """The folder of the .b2nd files."""
        return self.folder / self.data_identifier

    @property
    def journal(self) -> Path:
        return self.folder / f"{self.plans_name}_journal.jsonl"

    @property
    def manifest(self) -> Path:
        """Written last: its presence says that the store is finished."""
        return self.folder / "manifest.tsv"

    @property
    def is_begun(self) -> bool:
        """Whether there are plans of a store: those of a labelled data set, or of nnssl, tell no preprocessing."""
        return self.plans.is_file() and "preprocessing" in json.loads(self.plans.read_text())


def names_of(folder: Path) -> StoreNames:
    """Return the names of the store in the folder of a data set, today's where none is begun.

    Raises:
        UserError: there are two stores, which would share a manifest.
    """
    begun = [names for name in (PLANS_NAME, FORMER_PLANS_NAME) if (names := StoreNames(folder, name)).is_begun]
    if len(begun) > 1:
        raise UserError(
            f"{folder} holds two stores, {begun[0].plans.name} and one of version 0.1.0, {begun[1].plans.name}; "
            f"manifest.tsv does not tell of which it is. Remove one with its folder, journal and manifest.tsv, and run "
            "nnssl_prepare again."
        )
    return begun[0] if begun else StoreNames(folder)
