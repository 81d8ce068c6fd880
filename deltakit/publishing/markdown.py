"""Words of others in Markdown: what a delta says of itself is shown, and is never markup.

A name or a value of a file from anywhere may hold line ends, pipes, HTML, or the markers of a card.
All of it becomes text on one line. Where backticks do not serve, character references do, which
"cannot be used in place of symbols indicating structure" (CommonMark 0.31, 2.5).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

LONGEST = 240  # characters shown of a text
_AS_IT_IS = re.compile(r"[^\s`|\\]([^`|\\]*[^\s`|\\])?")  # GFM splits cells at pipes even in code


def code(value: object) -> str:
    """A text in the type of code, for paragraphs and cells of tables."""
    text = _one_line(value)
    if _AS_IT_IS.fullmatch(text):
        return f"`{text}`"
    shown = "".join(c if c.isalnum() or c in " .,=/" else f"&#{ord(c)};" for c in text)
    return f"<code>{shown}</code>"


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """A table of cells that are Markdown; the first row is its heading.

    right: the columns that are flush right.
    """
    flush = set(right)
    rule = ["---:" if column in flush else "---" for column in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def fenced(language: str, lines: Iterable[str]) -> str:
    """A block of code. The lines must be deltakit's own, with values of others quoted."""
    return "\n".join([f"```{language}", *lines, "```"])


def _one_line(value: object) -> str:
    """The text with what cannot be seen written out, on one line, and cut where it is long."""
    text = " ".join(str(value).split()) or "(empty)"
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
