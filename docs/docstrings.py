"""How docstrings become Markdown for the reference of the Python functions.

They are prose in which `name: meaning` tells parameters; here those become lists, and public names in
backticks and names of errors become links.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from griffe import Class, Extension, Function, Object

_TOLD = re.compile(r"(?:(?<=^)|(?<=[.;)\]] ))((?:\w+, )*\w+): ")
_NAMED = re.compile(r"`(?:dk\.)?([A-Za-z_][\w.]*)`|\b([A-Z]\w+Error)\b")


class Docstrings(Extension):
    """Rewrites the docstrings of functions, classes and their public members."""

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        exported = {
            name: member.final_target
            for name, member in pkg.members.items()
            if member.is_alias and member.target_path.startswith("deltakit.")
        }
        links = {name: f"deltakit.errors.{name}" for name in pkg["errors"].classes}
        for name, item in exported.items():
            links |= dict.fromkeys([name, f"deltakit.{name}", item.path], f"deltakit.{name}")
        for item in exported.values():
            self._rewrite(item, links)

    def _rewrite(self, item: Object, links: Mapping[str, str]) -> None:
        if item.docstring is not None:
            item.docstring.value = markdown(item.docstring.value, names_of(item), links)
        if isinstance(item, Class):
            for name, member in item.members.items():
                if not name.startswith("_") and not member.is_alias:
                    self._rewrite(member, links)


def names_of(item: Object) -> set[str]:
    """The names that a docstring may explain: parameters of a function, fields of a class."""
    if isinstance(item, Function):
        return {parameter.name for parameter in item.parameters}
    if isinstance(item, Class):
        return {parameter.name for parameter in item.parameters} | set(item.members)
    return set()


def markdown(text: str, names: set[str], links: Mapping[str, str]) -> str:
    """A docstring with what it tells of `names` as lists, and its names that have links as links."""

    def link(found: re.Match[str]) -> str:
        target = links.get(found[1] or found[2])
        return found[0] if target is None else f"[{found[0]}][{target}]"

    paragraphs = [_listed(" ".join(p.split()), names) for p in text.strip().split("\n\n")]
    return _NAMED.sub(link, "\n\n".join(paragraphs))


def _listed(paragraph: str, names: set[str]) -> str:
    """The paragraph, with one item of a list for each name that it tells."""
    starts = [m for m in _TOLD.finditer(paragraph) if set(m[1].split(", ")) <= names]
    if not starts:
        return paragraph
    ends = [m.start() for m in starts[1:]] + [len(paragraph)]
    items = [
        f"- {', '.join(f'`{n}`' for n in m[1].split(', '))}: {paragraph[m.end() : end].strip()}"
        for m, end in zip(starts, ends, strict=True)
    ]
    before = paragraph[: starts[0].start()].strip()
    items[-1], raises, after = items[-1].partition(" Raises ")  # which is said of the whole
    return "\n".join(
        [*[before, ""] * bool(before), *items, *["", f"{raises.strip()} {after}"] * bool(raises)]
    )
