"""docs/stacking.md, made from the registry of stacking methods.

python -m deltakit.combine.stacking_doc > docs/stacking.md
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import fields

from deltakit.combine import METHODS, Method
from deltakit.combine.method import FLAVOURS, option_names

_INTRODUCTION = """\
# Stacking methods

`deltakit stack A B --method NAME` and `dk.stack([a, b], "name")` make one delta of several; `deltakit
merge BASE A B --method NAME` stacks and merges at once, and `--tune-weights` looks for the weights on
validation data ([command line](cli.md#deltakit-stack)). Each method is computed on the union of the entries
alone, which gives exactly what its dense formula gives.

In the formulae tau_t is the change that delta t makes (its entries, and 0 elsewhere), w_t its weight
and `scale` a factor of the whole. Options are `--set NAME=VALUE`, the common ones flags of their own.
`--flavour mergekit` and `--flavour peft` take the options by which the numbers of these libraries come
out; the columns show what they change.
"""


def stacking_markdown() -> str:
    """A table of the methods with their papers, one section each, and the options they share."""
    rows = ((f"[`{r.name}`](#{r.name})", r.summary, r.source) for r in METHODS)
    lines = [_INTRODUCTION, *_rows(("method", "makes", "source"), rows)]
    for record in METHODS:
        lines += ["", f"## {record.name}", "", *_documented(record.target), ""]
        lines += _options(record.target)
    lines += ["", "## Options that methods share"]
    for kind, names in _shared():
        lines += ["", f"### {', '.join(f'`{name}`' for name in names)}", "", *_documented(kind)]
    return "\n".join(lines) + "\n"


def _documented(kind: type[Method]) -> list[str]:
    """The docstring as Markdown, its formula as a block of its own."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(kind.__doc__ or "").split("\n\n"):
        if paragraph.startswith("tau = "):
            shown = textwrap.fill(paragraph, 80, subsequent_indent="    ")
            lines += ["", "```text", shown, "```"]
        else:
            parts = paragraph.replace("\n", " ").split("`")  # every second one is code
            parts[::2] = [re.sub(r"([*_<\[])", r"\\\1", part) for part in parts[::2]]
            lines += ["", "`".join(parts)]
    return lines[1:]


def _options(kind: type[Method]) -> list[str]:
    """The options with the paper's values, and what each flavour of the method changes."""
    flavours = [name for name in FLAVOURS if name in kind.flavours]
    defaults = {field.name: field.default for field in fields(kind)}
    rows = []
    for name in option_names(kind):
        changed = (kind.flavours[f].get(name, defaults[name]) for f in flavours)
        others = ("" if value == defaults[name] else _value(value) for value in changed)
        rows.append((f"`{name}`", _value(defaults[name]), *others))
    return _rows(("option", "paper", *flavours), rows)


def _shared() -> Iterator[tuple[type[Method], list[str]]]:
    """The classes that methods are made of, with the options that each brings."""
    registered = {record.target for record in METHODS}
    parts = dict.fromkeys(part for record in METHODS for part in reversed(record.target.__mro__))
    for part in parts:
        if issubclass(part, Method) and part not in registered:
            names = [name for name in option_names(part) if name in vars(part)["__annotations__"]]
            if names:
                yield part, names


def _value(value: object) -> str:
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value}`"


def _rows(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(heads)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


if __name__ == "__main__":
    sys.stdout.write(stacking_markdown())
