"""Nested dataclasses from nested plain values, with errors that name the key, the type and the nearest valid key."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from nnunet_ssl.errors import UserError
from nnunet_ssl.schedules import Ramp

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

RANGES: dict[str, Callable[[float], bool]] = {
    "at least 1": lambda value: value >= 1,
    "positive": lambda value: value > 0,
    "0 or more": lambda value: value >= 0,
    "between 0 and 1": lambda value: 0 <= value <= 1,
    "at least 0 and below 1": lambda value: 0 <= value < 1,
    "above 0 and below 1": lambda value: 0 < value < 1,
    "1 to 100": lambda value: 1 <= value <= 100,
}


def ranged(default: Any, wanted: str) -> Any:
    """A field whose number, or whose ramp's, tuple's or mapping's numbers, must be as one of `RANGES` says; None is no
    number."""
    return dataclasses.field(default=default, metadata={"range": wanted})


def check_ranges(config: Any, where: str = "") -> None:
    """Check every ``ranged`` field of `config` and of the dataclasses in it.

    Raises:
        UserError: names the key, the value and what it must be.
    """
    for one in dataclasses.fields(config):
        value, key = getattr(config, one.name), f"{where}{one.name}"
        if wanted := one.metadata.get("range"):
            for name, number in _numbers(key, value).items():
                if not RANGES[wanted](number):
                    raise UserError(f"{name} is {number}; it must be {wanted}.")
        elif dataclasses.is_dataclass(value):
            check_ranges(value, f"{key}.")


def _numbers(key: str, value: Any) -> dict[str, float]:
    """The numbers of a field, by what messages call them."""
    if isinstance(value, Ramp):
        return {f"{key}.low": value.low, f"{key}.high": value.high}
    if isinstance(value, tuple):
        return {f"{key}[{place}]": one for place, one in enumerate(value)}
    if isinstance(value, Mapping):
        return {f"{key}.{name}": one for name, one in value.items()}
    return {} if value is None else {key: value}


def build(
    kind: type[T],
    values: Mapping[str, Any],
    where: str = "",
    base: T | None = None,
    built: Mapping[str, Any] | None = None,
) -> T:
    """Build the dataclass `kind` from `values`; a missing key is as in `base`, else the dataclass's default.

    Args:
        kind: a dataclass whose fields are int, float, bool, str, Literal, tuples of them, mappings of names to them,
            dataclasses, or one of those ``| None``.
        values: as a YAML file gives them.
        where: dotted prefix of the keys, for messages.
        base: what `values` are to change.
        built: further fields, as they are.

    Raises:
        UserError: an unknown or missing key, or a value of the wrong type.
    """
    converted = keywords_of(kind, values, where) | dict(built or {})
    if base is not None:
        return dataclasses.replace(base, **converted)
    missing = [
        name for name, one in _fields(kind).items() if name not in values and _default(one) is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"The key '{where}{missing[0]}' is missing.")
    return kind(**converted)


def keywords_of(kind: type, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """The keywords of the dataclass `kind` that `values` give, each of its field's type; as :func:`build`.

    Raises:
        UserError: an unknown key, or a value of the wrong type.
    """
    fields, hints = _fields(kind), typing.get_type_hints(kind)
    if not isinstance(values, Mapping):
        raise UserError(f"{where.rstrip('.')} is {values!r}; it takes keys: {', '.join(fields)}.")
    for key in values:
        if key not in fields:
            raise UserError(f"There is no key '{where}{key}'{_nearest(key, fields, where)}")
    return {key: _value(value, hints[key], f"{where}{key}", _default(fields[key])) for key, value in values.items()}


def _value(value: Any, kind: Any, where: str, default: Any) -> Any:
    """A field's value from a plain one: a dataclass, None where one may be missing, or what :func:`_convert` makes."""
    kinds = (one for one in (kind, *typing.get_args(kind)) if isinstance(one, type))
    section = next((one for one in kinds if dataclasses.is_dataclass(one)), None)
    if section is None or (value is None and section is not kind):
        return _convert(value, kind, where)
    return build(section, value, f"{where}.", default)


TRUTHS = {"true": True, "false": False}


def keywords_of_line(kind: type, line: str) -> dict[str, Any]:
    """The same from one line, ``key=value,key=value``, in which a list is written ``96x96x96``.

    Nothing of it is read as YAML, for which 0100 is 64.
    """
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in line.split(","))):
        key, _, text = (part.strip() for part in item.partition("="))
        kinds = (hints.get(key), *typing.get_args(hints.get(key)))
        values[key] = TRUTHS.get(text.lower(), text) if bool in kinds else _number(text) if int in kinds else text
    return keywords_of(kind, values)


def assign(values: dict[str, Any], override: str) -> None:
    """Set one ``nested.key=value`` in `values`, in place; the value is read as YAML. In place of a null goes a section.

    Raises:
        UserError: it is not of that form, or the value is not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"'{override}' is not of the form key=value.")
    *parents, last = key.strip().split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        if not isinstance(values[parent], dict):
            raise UserError(f"'{override}': '{parent}' has no keys below it.")
        values = values[parent]
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"'{override}': '{text}' is not a YAML value.") from error


def _fields(kind: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields that have a key."""
    return {one.name: one for one in dataclasses.fields(kind) if one.metadata.get("key", True)}


def _default(one: dataclasses.Field[Any]) -> Any:
    return one.default if one.default_factory is dataclasses.MISSING else one.default_factory()


def _nearest(key: str, fields: Mapping[str, Any], where: str) -> str:
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
    return f"; did you mean '{where}{near[0]}'?" if near else f". Keys here: {', '.join(fields)}."


def _convert(value: Any, kind: Any, where: str) -> Any:
    """Return `value` as `kind`, or raise a :class:`UserError` that says what was expected."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _convert(value, inner, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{where} is {value!r}; it can be {', '.join(map(str, arguments))}.")
        return value
    if origin is tuple:
        return _convert_tuple(value, arguments, where)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} is {value!r}; it takes a value for each name, such as {{name: 1}}.")
        return {str(name): _convert(one, arguments[1], f"{where}.{name}") for name, one in value.items()}
    return _convert_scalar(value, kind, where)


def _convert_tuple(value: Any, arguments: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    """A list, or "2,2,6,2" or "96x96x96" as typed on a command line; one number stands for a fixed number of equal
    ones."""
    fixed = arguments[-1] is not Ellipsis
    items = value
    if isinstance(value, str) and str in arguments:
        items = [item.strip() or None for item in value.split(",")]  # None is refused as text that is missing
    elif isinstance(value, str):
        items = [_number(item) for item in re.split("[x,]", value)]
        items = items[0] if len(items) == 1 and fixed else items
    if fixed and isinstance(items, (int, float)) and not isinstance(items, bool):
        items = [items] * len(arguments)
    if not isinstance(items, (list, tuple)) or (fixed and len(items) != len(arguments)):
        count = f"{len(arguments)} values" if fixed else "a list"
        raise UserError(f"{where} is {value!r}; it takes {count}, such as [{', '.join(['2'] * len(arguments))}].")
    kinds = arguments if fixed else [arguments[0]] * len(items)
    return tuple(_convert(item, kind, f"{where}[{place}]") for place, (item, kind) in enumerate(zip(items, kinds)))


def _number(text: str) -> int | str:
    """The whole number that `text` is, or the text itself."""
    try:
        return int(text)
    except ValueError:
        return text


def _convert_scalar(value: Any, kind: type, where: str) -> Any:
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as text
        except ValueError:
            pass
    if type(value) is not kind:
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
        raise UserError(f"{where} is {value!r}; it takes {wanted}.")
    return value
