"""Which rows of a table speak of which subjects: names that differ in prefix or zero padding alone find each other."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

Name = tuple[str, ...]
"""A subject, or its data set, subject and session, or whatever else a table is keyed by."""

_PREFIX = re.compile(r"^(subject|session|sub|ses)[-_ ]?(?=.)")
_PADDING = re.compile(r"(?<!\d)0+(?=\d)")


def find_partners(names: Iterable[Name], known: Iterable[Name]) -> dict[Name, Name]:
    """Match the names in a table with the known ones: `1`, `01`, `sub_1` and `SUB-01` all find `sub-01`.

    Equal names belong together; then those that are equal but for capitals and the prefixes of subjects and sessions;
    then those that are equal but for leading zeros, too. Two names that come out alike are ambiguous on either side,
    and find no partner: with `sub-1` and `sub-01` among the known names, `001` finds none.

    Returns:
        name -> known name, for the names that have a partner; no known name comes twice.
    """
    names, known = list(dict.fromkeys(names)), list(dict.fromkeys(known))
    partners = {name: name for name in set(names) & set(known)}
    taken = set(partners)
    for simplified in (_without_prefix, _without_padding):
        if len(partners) == len(names):
            break
        candidates = _grouped(known, simplified)
        for key, alike in _grouped(names, simplified).items():
            found = candidates[key]
            if len(alike) == len(found) == 1 and alike[0] not in partners and found[0] not in taken:
                partners[alike[0]] = found[0]
                taken.add(found[0])
    return partners


def describe_partners(rows: Sequence[Name], partners: Mapping[Name, Name], without_row: Collection[str]) -> str:
    """Say in a clause what of a table and of the subjects found no partner, and which names had to be guessed.

    Args:
        rows: the name in each row of the table.
        partners: what :func:`find_partners` found.
        without_row: the subjects that no row speaks of.

    Returns:
        the clause, "" if everything matches as it is written.
    """
    clauses = []
    guessed = [name for name, partner in partners.items() if name != partner]
    if guessed:
        written, meant = min((name, partners[name]) for name in guessed)
        clauses.append(f"{len(guessed)} names differ in prefix or zero padding ({_text(written)} is {_text(meant)})")
    lost = [row for row in rows if row not in partners]
    if lost:
        clauses.append(f"{len(lost)} of {len(rows)} rows speak of nothing here, such as {_text(lost[0])}")
    if without_row:
        clauses.append(f"{len(without_row)} subjects have no row, such as {min(without_row)}")
    return "; ".join(clauses)


def _grouped(names: Iterable[Name], simplified: Callable[[str], str]) -> defaultdict[Name, list[Name]]:
    groups = defaultdict(list)
    for name in names:
        groups[tuple(map(simplified, name))].append(name)
    return groups


def _without_prefix(text: str) -> str:
    return _PREFIX.sub("", text.casefold())


def _without_padding(text: str) -> str:
    return _PADDING.sub("", _without_prefix(text))


def _text(name: Name) -> str:
    return "/".join(name) or "an empty name"
