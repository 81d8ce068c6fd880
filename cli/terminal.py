"""What a terminal gets beside plain text: colours, and stand-ins for what its encoding lacks."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from io import TextIOWrapper
from typing import Any, TextIO

import click

_SUGGESTION = re.compile(r"(?<=; nearest: )[^;]+")
_WORDS: dict[str, dict[str, Any]] = {
    "Error": {"fg": "red", "bold": True},
    "Warning": {"fg": "yellow"},
    "Note": {"fg": "cyan"},
}


def asked_colour(environment: Mapping[str, str] | None = None) -> bool | None:
    """What the environment says about colours; None leaves it to each stream.

    NO_COLOR wins over FORCE_COLOR and CLICOLOR_FORCE, and those over CLICOLOR=0 and TERM=dumb
    (no-color.org, force-color.org, bixense.com/clicolors).
    """
    given = os.environ if environment is None else environment
    if given.get("NO_COLOR"):
        return False
    if any(given.get(name, "0") not in ("", "0") for name in ("FORCE_COLOR", "CLICOLOR_FORCE")):
        return True
    return False if given.get("CLICOLOR") == "0" or given.get("TERM") == "dumb" else None


def styled(text: str, stream: TextIO | None = None, **style: Any) -> str:
    """The text in a style where the stream (stdout by default) shows colours, plain elsewhere."""
    asked = asked_colour()
    coloured = (stream or sys.stdout).isatty() if asked is None else asked
    return click.style(text, **style) if coloured else text


def marked(line: str) -> str:
    """A line for stderr: its first word, such as `Error:`, and the names it suggests in colour."""
    word, colon, rest = line.partition(":")
    if not colon or word not in _WORDS:
        return line
    shown = _SUGGESTION.sub(lambda found: styled(found[0], sys.stderr, fg="green"), rest)
    return f"{styled(word + colon, sys.stderr, **_WORDS[word])}{shown}"


def show_what_can_be_shown() -> None:
    r"""Let output go on as `\xe9` where a stream's encoding lacks a character, not end in an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
