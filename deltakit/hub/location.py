"""Where something stands on the Hub: `hf://owner/repo[@revision][/file or folder]`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from deltakit.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

_PREFIX = re.compile(r"hf:/{1,2}(?!/)")  # pathlib makes one slash of two
_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?", re.ASCII)
_REF = re.compile(
    r"refs/(pr/\d+|convert/[^/]+)(?=/|$)"
)  # may stand unquoted, as in huggingface_hub
_OTHERS = ("datasets", "spaces", "buckets")
_FORM = "hf://owner/repo[@revision][/file]"


@dataclass(frozen=True, slots=True)
class Location:
    """A model repository, or a file or folder in it.

    repo: "owner/name". revision: a branch, tag or commit, None for the default branch. path: of a
    file or folder from the root of the repository, "" for all of it. `str` gives the text back that
    `parse` reads.
    """

    repo: str
    revision: str | None = None
    path: str = ""

    @classmethod
    def parse(cls, given: str | os.PathLike[str]) -> Self:
        """Read a location; slashes in a revision are written %2F, but `refs/pr/1` need not be.

        Raises ConfigError for what is none.
        """
        text = _text(given)
        begin = _PREFIX.match(text)
        owner, _, rest = ("", "", "") if begin is None else text[begin.end() :].partition("/")
        if owner in _OTHERS:
            raise ConfigError(f"{text}: deltas and bases stand in model repositories, not {owner}")
        name, at, rest = _split(rest)
        revision, path = _revision(rest) if at else (None, rest)
        if not (_NAME.fullmatch(owner) and _NAME.fullmatch(name)):
            raise ConfigError(f"{text}: no repository of the Hub; expected {_FORM}")
        if revision is not None and not _is_ref(revision):
            raise ConfigError(f"{text}: no branch, tag or commit after @; expected {_FORM}")
        path = path.removesuffix("/")
        if path and not all(part not in ("", ".", "..") for part in path.split("/")):
            raise ConfigError(f"{text}: no path of a file after the repository; expected {_FORM}")
        if "\\" in path or not path.isprintable():
            raise ConfigError(f"{text}: {path!r} is no path in a repository; expected {_FORM}")
        return cls(f"{owner}/{name}", revision, path)

    @property
    def name(self) -> str:
        """The last part: of the path, or else of the repository."""
        return (self.path or self.repo).rpartition("/")[2]

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{quote(self.revision, safe='')}"
        return f"hf://{self.repo}{revision}{'/' if self.path else ''}{self.path}"


def is_location(given: object) -> bool:
    """Whether a path given by the user is meant to be on the Hub."""
    return isinstance(given, (str, os.PathLike)) and _PREFIX.match(_text(given)) is not None


def _text(given: str | os.PathLike[str]) -> str:
    return given.as_posix() if isinstance(given, PurePath) else os.fspath(given)


def _split(rest: str) -> tuple[str, str, str]:
    """What follows the owner, as the name, "@" where a revision comes, and the rest."""
    found = re.search(r"[@/]", rest)
    if found is None:
        return rest, "", ""
    at = "@" if found.group() == "@" else ""
    return rest[: found.start()], at, rest[found.end() :]


def _revision(rest: str) -> tuple[str, str]:
    unquoted = _REF.match(rest)
    if unquoted is not None:
        return unquoted.group(), rest[unquoted.end() + 1 :]
    revision, _, path = rest.partition("/")
    return unquote(revision), path


def _is_ref(text: str) -> bool:
    """Whether git could have this as a name (git-check-ref-format); it becomes a path as well."""
    parts = text.split("/")
    return text.isprintable() and not any(
        not part or ".." in part or part[0] in ".-" or re.search(r"[\s~^:?*\[\\]", part)
        for part in parts
    )
