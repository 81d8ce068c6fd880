"""Kinds of settings: how a value from YAML, a flag or Python is read, checked and shown.

A setting is a dataclass field made by `setting(...)`; its kind, group and one-line help are the
only description, from which the checks, the command line and the saved file are made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Any

import yaml

from deltakit.budget import parse_budget
from deltakit.errors import ConfigError, DeltakitError, nearest

AUTO = "auto"  # the learning rate that a sweep finds


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind of value is read.

    parse: any given value -> the checked value; raises ValueError saying what was expected.
    metavar: the placeholder in the help. many: the value is a tuple, and its flag may be repeated.
    names: what a shell offers where names are taken; without importing torch.
    """

    parse: Callable[[Any], Any]
    metavar: str
    many: bool = False
    names: Callable[[], Iterable[str]] = tuple


@dataclass(frozen=True, slots=True)
class Setting:
    """The description of one setting, kept in its dataclass field's metadata."""

    kind: Kind
    group: str
    about: str


def setting(default: Any, kind: Kind, group: str, about: str) -> Any:
    """A dataclass field that carries its own description."""
    metadata = {"setting": Setting(kind, group, about)}
    return field(default=default, metadata=metadata)


def text(metavar: str = "TEXT", names: Callable[[], Iterable[str]] = tuple) -> Kind:
    """Any text; names: some that are known."""
    return Kind(_text, metavar, names=names)


def whole(least: int) -> Kind:
    """A whole number of at least `least`."""

    def parse(value: Any) -> int:
        number = _number(value, "a whole number")
        if number != int(number):
            raise ValueError("expected a whole number")
        if number < least:
            raise ValueError(f"expected at least {least}")
        return int(number)

    return Kind(parse, "N")


def real(least: float = 0.0, most: float | None = None, *, above: bool = False) -> Kind:
    """A finite number in [least, most]; `above` leaves `least` itself out."""

    def parse(value: Any) -> float:
        number = _number(value, "a number")
        if number < least or (above and number == least):
            raise ValueError(f"expected {'more than' if above else 'at least'} {least:g}")
        if most is not None and number > most:
            raise ValueError(f"expected at most {most:g}")
        return float(number)

    return Kind(parse, "X")


def learning_rate() -> Kind:
    """A positive number, or `auto`."""
    positive = real(above=True)

    def parse(value: Any) -> float | str:
        if value == AUTO:
            return AUTO
        rate: float = positive.parse(value)
        return rate

    return Kind(parse, "X|auto", names=lambda: (AUTO,))


def option() -> Kind:
    """`name=value`, the value in YAML; kept as it was written."""

    def parse(value: Any) -> str:
        parse_option(value)
        return str(value)

    return Kind(parse, "NAME=VALUE")


def parse_option(value: Any) -> tuple[str, Any]:
    """Name and value of `name=value`; ValueError for anything else. Lists become tuples."""
    name, equals, given = str(value).partition("=")
    if not name.strip().isidentifier() or not equals:
        raise ValueError("expected name=value")
    try:
        read = yaml.safe_load(given)
    except yaml.YAMLError:
        raise ValueError("expected a number, text or [list] after the =") from None
    return name.strip(), _unwritten(read)


def _unwritten(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_unwritten(item) for item in value)
    try:
        return float(value) if isinstance(value, str) else value  # YAML 1.1 reads 1e-3 as text
    except ValueError:
        return value


def entry_count() -> Kind:
    """A count or share of entries, kept as it was written ("100k", "0.1%")."""
    return Kind(_budget, "N")


def one_of(*names: str) -> Kind:
    """One of a few names."""
    return choice(lambda: names, "|".join(names))


def yes_or_no() -> Kind:
    """A truth value: true, false, yes, no."""
    words = {"true": True, "yes": True, "false": False, "no": False}

    def parse(value: Any) -> bool:
        known = words.get(str(value).lower())
        if known is None:
            raise ValueError("expected true or false")
        return known

    return Kind(parse, "true|false", names=lambda: ("true", "false"))


def choice(
    names: Callable[[], Sequence[str]],
    metavar: str = "NAME",
    quick: Callable[[], Iterable[str]] | None = None,
) -> Kind:
    """One of some names, asked for only when needed. quick: the names as a shell offers them, where
    asking for all would import torch."""

    def parse(value: Any) -> str:
        known = list(names())
        if value not in known:
            raise ValueError(f"expected one of {', '.join(known)}{nearest(str(value), known)}")
        return str(value)

    return Kind(parse, metavar, names=quick or names)


def many(kind: Kind, separator: str = "") -> Kind:
    """A tuple of values of one kind: given as a list, as one value, or "" for none at all.

    separator: what stands between values within one text, if anything may.
    """

    def parse(value: Any) -> tuple[Any, ...]:
        if isinstance(value, str):
            value = (value.split(separator) if separator else [value]) if value else []
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(kind.parse(item) for item in items)

    metavar = kind.metavar + (f"{separator}..." if separator else "")
    return Kind(parse, metavar, many=True, names=kind.names)


def parse_setting(name: str, described: Setting, value: Any) -> Any:
    """The checked value of one setting; ConfigError names the setting, its value and the rule."""
    try:
        return described.kind.parse(value)
    except DeltakitError:
        raise
    except ValueError as error:
        raise ConfigError(f"setting {name}: {error}; found {value!r}") from None


def _text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if not isinstance(value, (str, int, float)) or isinstance(value, bool) or value == "":
        raise ValueError("expected text")
    return str(value)


def _number(value: Any, expected: str) -> float:
    # YAML 1.1 reads 1e-3 as text, and flags are text, so numbers may come as text.
    try:
        number = nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = nan
    if not isfinite(number):
        raise ValueError(f"expected {expected}")
    return number


def _budget(value: Any) -> str | int:
    if type(value) not in (str, int):
        raise ValueError("expected a number of entries such as 100k or 0.1%")
    value = value.strip() if isinstance(value, str) else value
    parse_budget(value, total=1000)  # a share is resolved later; here only its form is checked
    return int(value) if str(value).isdecimal() else value
