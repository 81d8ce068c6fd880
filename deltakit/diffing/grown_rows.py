"""Rows appended to a tensor, such as new tokens of a vocabulary: how a delta names them.

Where a tuned tensor has more rows than the base's, the delta keeps entries for the rows that both
have, whose flat indices are the same, and the new rows as an extra called `name[rows:]`, `rows`
being the number of rows of the base's tensor: `lm_head.weight[32000:]`. Merging appends them.
"""

from __future__ import annotations

import re

_NAME = re.compile(r"(?P<tensor>.+)\[(?P<rows>0|[1-9]\d*):\]", re.DOTALL)


def rows_name(tensor: str, rows: int) -> str:
    """The name of the extra that holds what comes after the first `rows` rows of `tensor`."""
    return f"{tensor}[{rows}:]"


def appended_to(extra: str) -> tuple[str, int] | None:
    """The tensor that the rows in `extra` are appended to, and how many rows it has before; None
    for an extra that is a tensor of its own."""
    match = _NAME.fullmatch(extra)
    return None if match is None else (match["tensor"], int(match["rows"]))


def has_grown(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether a tensor of shape `after` is one of shape `before` with rows appended."""
    return len(before) == len(after) >= 1 and before[1:] == after[1:] and before[0] < after[0]
