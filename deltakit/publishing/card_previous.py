"""What people wrote in a card: its next version keeps all of that, to the letter.

Theirs are the text before and after the section that deltakit writes, the text inside it between
the marks KEEP and KEPT, and the metadata that the section's first line does not name as deltakit's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from deltakit.errors import ConfigError

END = "<!-- deltakit: end -->"
KEEP = "<!-- deltakit: keep -->"
KEPT = "<!-- deltakit: kept -->"
_BEGIN = re.compile(r"<!-- deltakit: begin\b(?:.*; metadata: (?P<keys>[\w, -]*))?.*-->")
_YAML_LINES = re.compile(r"(?<=[\n\r\x85\u2028\u2029])")  # as PyYAML counts them
_WHERE = "README.md of the repository"
_MEND = "mend README.md there, or delete it, and push again"


@dataclass(frozen=True, slots=True)
class Previous:
    """A card taken apart.

    before, kept, after: text of people, with its line ends; kept is None where deltakit wrote no
    section before. metadata: key -> its lines of YAML as they stand. tags: all that are listed.
    """

    before: str = ""
    kept: str | None = None
    after: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()


def begin(keys: Iterable[str]) -> str:
    """The first line of the section, which names the metadata that is deltakit's."""
    return (
        f"<!-- deltakit: begin; deltakit push writes this section anew, except what stands between "
        f'"keep" and "kept", and above it this; metadata: {", ".join(keys)} -->'
    )


def taken_apart(card: str) -> Previous:
    """What people wrote in a README.md, by deltakit or not.

    Raises ConfigError for metadata that is no YAML and for marks that are not in order.
    """
    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    front = REGEX_YAML_BLOCK.match(card)
    body = card if front is None else card[front.end() :]
    parts, keys = _parts(body)
    lines, tags = ({}, ()) if front is None else _metadata(front[2])
    theirs = {key: text for key, text in lines.items() if key not in keys}
    kept = parts["keep"] if parts["section"] else None
    return Previous(parts["before"], kept, parts["after"], theirs, tags)


def check_metadata(text: str) -> None:
    """Raise ConfigError where the lines of people and of deltakit make no YAML together."""
    try:
        if isinstance(yaml.safe_load(text), dict):
            return
    except (yaml.YAMLError, ValueError):  # such as a date that the calendar lacks
        pass
    raise ConfigError(f"{_WHERE}: its metadata is no YAML that can be added to; {_MEND}")


def _parts(body: str) -> tuple[dict[str, str], set[str]]:
    """The text of each part, and the metadata that the section calls its own."""
    parts = dict.fromkeys(("before", "section", "keep", "after"), "")
    keys: set[str] = set()
    where = "before"
    for line in re.split(r"(?<=\n)", body):
        mark = line.strip()
        begun = _BEGIN.fullmatch(mark)
        if begun and where == "before":
            where, keys = "section", {k.strip() for k in (begun["keys"] or "").split(",")}
        elif mark == KEEP and where == "section":
            where = "keep"
        elif mark == KEPT and where == "keep":
            where = "section"
        elif mark == END and where == "section":
            where = "after"
        elif begun or mark in (KEEP, KEPT, END):
            raise ConfigError(f"{_WHERE}: {mark!r} is out of place; {_MEND}")
        else:
            parts[where] += line
    if where in ("section", "keep"):
        missing = END if where == "section" else KEPT
        raise ConfigError(f"{_WHERE}: {missing!r} is missing; {_MEND}")
    return parts, keys


def _metadata(text: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Key -> its lines, not parsed: YAML of other versions reads `no` or 1.10 in other ways."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" (line {mark.line + 2})"
        raise ConfigError(f"{_WHERE}: its metadata is no YAML{line}; {_MEND}") from None
    if root is None:
        return {}, ()
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        raise ConfigError(f"{_WHERE}: its metadata is no list of keys; {_MEND}")
    lines = _YAML_LINES.split(text)
    starts = [_above(key.start_mark.line, lines) for key, _ in root.value]
    found: dict[str, str] = {}
    for (key, _), start, stop in zip(root.value, starts, [*starts[1:], len(lines)], strict=True):
        block = "".join(lines[start:stop])
        found[str(key.value)] = block if block.endswith("\n") else block + "\n"
    return found, tuple(_tags(root))


def _above(line: int, lines: list[str]) -> int:
    """Where the comments begin that stand right above a line."""
    while line and lines[line - 1].startswith("#"):
        line -= 1
    return line


def _tags(root: yaml.MappingNode) -> Iterable[str]:
    for key, value in root.value:
        if key.value == "tags":
            items = value.value if isinstance(value, yaml.SequenceNode) else [value]
            yield from (str(item.value) for item in items if isinstance(item, yaml.ScalarNode))
