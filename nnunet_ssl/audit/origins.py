"""Where data comes from: which public data sets the names in a corpus and in a labelled data set speak of."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

TABLE = Path(__file__).with_name("origins.yaml")

_WORD = re.compile(r"[a-z0-9-]+")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A public data set: its name, words that give it away, and what of others is inside it, by name, with a source."""

    name: str
    what: str
    words: frozenset[str]
    subject: str | None = None
    openneuro: bool = False
    contains: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class KnownCorpus:
    """What somebody said of a corpus for pre-training: the origins inside it, with sources."""

    name: str
    what: str
    contains: dict[str, str]
    from_openneuro: bool = False


@functools.cache
def known_origins() -> dict[str, Origin]:
    table = yaml.safe_load(TABLE.read_text())["origins"]
    return {name: Origin(name=name, **{**entry, "words": frozenset(entry["words"])}) for name, entry in table.items()}


@functools.cache
def known_corpora() -> dict[str, KnownCorpus]:
    table = yaml.safe_load(TABLE.read_text())["corpora"]
    return {name: KnownCorpus(name=name, **entry) for name, entry in table.items()}


def origins_in(names: Iterable[str]) -> dict[str, str]:
    """Return the origins that names and paths speak of, and those inside them: origin -> why."""
    words = {word for name in names for word in words_of(name)}
    found = {
        origin.name: f"named {', '.join(sorted(origin.words & words))}"
        for origin in known_origins().values()
        if origin.words & words
    }
    for name in list(found):
        for inside, source in known_origins()[name].contains.items():
            found.setdefault(inside, f"in {name}: {source}")
    return found


def words_of(name: str) -> set[str]:
    """Return the words of a name or path: `PT014_SOOP` has pt014 and soop; `brats-gen` is also brats and gen."""
    whole = set(_WORD.findall(name.lower()))
    return whole | {part for word in whole for part in word.split("-")} - {""}


def inside_corpus(corpus: KnownCorpus, origins: Iterable[str]) -> dict[str, str]:
    """Say of origins what is known of their being inside a corpus; those of which nothing is known are left out."""
    told = {}
    for name in origins:
        if name in corpus.contains:
            told[name] = f"inside it: {corpus.contains[name]}"
        elif corpus.from_openneuro and known_origins()[name].openneuro:
            told[name] = "may be inside it, for it gathers OpenNeuro: look at its list of files"
    return told
