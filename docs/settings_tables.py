"""Tables of settings for the site, made from the dataclasses that hold them: key, default, what it takes, meaning.

What a field means is said by the comment at its end, which may go on in lines of its own below, or by the `Attributes:`
of its class. `tests/test_docs.py` asks for one of either of every field.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import importlib
import inspect
import io
import re
import textwrap
import tokenize
import types
import typing
from typing import Any

import yaml

from nnunet_ssl.schedules import Ramp

PLACEHOLDER = re.compile(r"<!-- settings: ([\w.]+)(?: as (\w+))? -->")
"""Where a table belongs: the dataclass, and the key of its section, if it is one."""

WORDS = {int: "a whole number", float: "a number", str: "text", bool: "`true`, `false`"}


def with_tables(markdown: str) -> str:
    """Put tables where placeholders ask for them."""
    return PLACEHOLDER.sub(lambda found: tables_of(dataclass_at(found[1]), found[2] or ""), markdown)


def dataclass_at(path: str) -> type:
    module, _, name = path.rpartition(".")
    kind: type = getattr(importlib.import_module(module), name)
    return kind


def tables_of(kind: type, section: str = "") -> str:
    """The table of a dataclass, and below it one of each dataclass among its fields, under a heading of its own."""
    prefix = f"{section}." if section else ""
    heading = f"{'#' * (2 + section.count('.'))} {section}\n\n{plain(first_paragraph(kind))}\n\n" if section else ""
    rows, below = [], []
    hints, meanings = typing.get_type_hints(kind), meanings_of(kind)
    for field in keyed_fields(kind):
        hint = without_none(hints[field.name])
        if is_section(hint):
            below.append(tables_of(hint, prefix + field.name))
        else:
            cells = (f"`{prefix}{field.name}`", written(default_of(field)), takes(hint, field))
            cells += (plain(meanings[field.name]),)
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    table = "\n".join(["| key | default | takes | meaning |", "|---|---|---|---|", *rows])
    return "\n\n".join([heading + table, *below])


def without_none(hint: Any) -> Any:
    """What a field holds if it holds something: ``int`` of ``int | None``."""
    kinds = [one for one in typing.get_args(hint) if one is not type(None)]
    return kinds[0] if typing.get_origin(hint) in (typing.Union, types.UnionType) else hint


def is_section(hint: Any) -> bool:
    """Whether a field has keys of its own. A ramp is one value, whose four numbers are told at once."""
    return dataclasses.is_dataclass(hint) and hint is not Ramp


def keyed_fields(kind: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(kind) if field.metadata.get("key", True)]


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def meanings_of(kind: type) -> dict[str, str]:
    """What is said of each field: by the `Attributes:` of the class, or by comments; empty where nothing is."""
    source = textwrap.dedent(inspect.getsource(kind))
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    starts = [node.lineno for node in body.body]
    comments: dict[int, list[str]] = {}  # by the line at which the statement before it begins
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and starts[0] <= token.start[0]:
            owner = max(start for start in starts if start <= token.start[0])
            comments.setdefault(owner, []).append(token.string.lstrip("# "))
    by_comment = {
        node.target.id: " ".join(comments.get(node.lineno, []))
        for node in body.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return {name: attributes_of(kind).get(name, text) for name, text in by_comment.items()}


def attributes_of(kind: type) -> dict[str, str]:
    """The `Attributes:` of a docstring, by name."""
    _, _, text = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |^\S|\Z)", text, re.M | re.S)
    return {name: " ".join(meaning.split()) for name, meaning in found}


def first_paragraph(kind: type) -> str:
    return " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())


def plain(text: str) -> str:
    """reStructuredText's marks as Markdown's."""
    return re.sub(r":\w+:`([^`]*)`|``([^`]*)``", lambda found: f"`{found[1] or found[2]}`", text)


def written(value: Any) -> str:
    """A default as YAML has it; a ramp in words; nothing for None, which the meaning explains."""
    if isinstance(value, Ramp):
        begin, until = (f"{100 * share:g}" for share in (value.begin, value.until))
        return f"{value.low:g} to {value.high:g} between {begin} and {until} % of the steps"
    if value is None or value == "" or value == {}:
        return ""
    plain_value = list(value) if isinstance(value, tuple) else value
    return f"`{yaml.safe_dump(plain_value, default_flow_style=True).replace('...', '').strip()}`"


def takes(hint: Any, field: dataclasses.Field[Any]) -> str:
    """What a value must be, by type and range."""
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{str(one).lower() if isinstance(one, bool) else one}`" for one in kinds)
    if typing.get_origin(hint) is tuple:
        words = "whole numbers" if kinds[0] is int else "numbers"
        words = words if Ellipsis in kinds else f"{len(kinds)} {words}"
    elif typing.get_origin(hint) is collections.abc.Mapping:
        words = "a number by name"
    else:
        words = "`low`, `high`, `begin`, `until`" if hint is Ramp else WORDS[hint]
    wanted = field.metadata.get("range")
    return f"{words}, {wanted}" if wanted else words
