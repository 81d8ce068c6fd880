"""Registries: a plug-in is a function or class plus one record that help and docs are made from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Generic, TypeVar

from deltakit.errors import ConfigError, nearest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Record(Generic[T]):
    """What is known about one plug-in: its name, one line about it, and its source."""

    name: str
    summary: str
    source: str  # paper and year, or "" where there is none
    target: T


class Registry(Generic[T]):
    """A named family of plug-ins, in order of registration."""

    def __init__(self, family: str) -> None:
        self.family = family
        self._records: dict[str, Record[T]] = {}

    def register(self, name: str, summary: str, source: str = "") -> Callable[[T], T]:
        """Decorator that enters a function or class under `name`."""

        def enter(target: T) -> T:
            if name in self._records:
                raise ConfigError(f"{self.family} {name!r} is registered twice")
            self._records[name] = Record(name, summary, source, target)
            return target

        return enter

    def __getitem__(self, name: str) -> T:
        try:
            return self._records[name].target
        except KeyError:
            known = list(self._records)
            hint = nearest(name, known) or f"; known: {', '.join(known)}"
            raise ConfigError(f"unknown {self.family} {name!r}{hint}") from None

    def __iter__(self) -> Iterator[Record[T]]:
        return iter(self._records.values())

    def names(self) -> list[str]:
        """All names, in order of registration."""
        return list(self._records)


def declared(package: str, registry: str) -> list[str]:
    """The names that decorators in a package's source enter in a registry, sorted.

    Nothing of the package is imported, so a shell can be told names of what needs torch, at once.
    """
    spec = find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    entering = re.compile(rf'^@{registry}\.register\(\s*"([^"]+)"', re.MULTILINE)
    files = [file for folder in folders for file in Path(folder).glob("*.py")]
    return sorted(name for f in files for name in entering.findall(f.read_text(encoding="utf-8")))
