"""JSON read without mercy and written in one way only.

Reading refuses what parsers disagree about: keys that occur twice, NaN and Infinity, lone
surrogates, enormous integers, bottomless nesting. Writing is canonical: sorted keys, no spaces,
ASCII, so that equal content is equal bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from math import isfinite
from typing import Any

from deltakit.errors import FormatError

MAX_DIGITS = 1000  # below every Python's own limit, so that all of them refuse the same numbers
MAX_DEPTH = 64


def loads(text: bytes, what: str) -> Any:
    """The value of UTF-8 JSON `text`; FormatError starting with `what` where it breaks a rule."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) != len(items):
            twice = Counter(key for key, _ in items).most_common(1)[0][0]
            raise FormatError(f"{what}: the key {twice!r} stands twice in one JSON object")
        return made

    def integer(digits: str) -> int:
        if len(digits.lstrip("-")) > MAX_DIGITS:
            raise FormatError(f"{what}: an integer of {len(digits)} digits is not acceptable")
        return int(digits)

    def constant(name: str) -> Any:
        raise FormatError(f"{what}: {name} is not JSON")

    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=pairs,
            parse_int=integer,
            parse_constant=constant,
        )
    except UnicodeDecodeError as error:
        raise FormatError(f"{what}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise FormatError(f"{what}: not JSON at character {error.pos} ({error.msg})") from None
    except RecursionError:
        raise FormatError(f"{what}: JSON is nested too deeply") from None


def dumps(value: Any) -> str:
    """`value` as canonical JSON: keys sorted by code point, no spaces, ASCII.

    Raises FormatError for what is no JSON (NaN, a key that is no string, nesting beyond 64 levels).
    """
    check_plain(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def compact(value: Any) -> str:
    """`value` as ASCII JSON without spaces, keys in the order they stand in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def check_plain(value: Any, what: str = "JSON", depth: int = 0) -> None:
    """Raise FormatError unless `value` is JSON that every reader gives back unchanged.

    depth: levels of nesting that `value` already stands in.
    """
    pending: list[tuple[Any, int]] = [(value, depth)]
    while pending:
        item, level = pending.pop()
        if level > MAX_DEPTH:
            raise FormatError(f"{what}: JSON is nested deeper than {MAX_DEPTH} levels")
        if isinstance(item, dict):
            for key in item:
                if not isinstance(key, str):
                    raise FormatError(f"{what}: the key {key!r} is {type(key).__name__}, not str")
                check_text(key, what)
            pending += [(child, level + 1) for child in item.values()]
        elif isinstance(item, (list, tuple)):
            pending += [(child, level + 1) for child in item]
        else:
            _check_scalar(item, what)


def check_text(text: str, what: str) -> None:
    """Raise FormatError for text that has no UTF-8 form (a lone surrogate)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError(f"{what}: {text!a} holds a lone surrogate") from None


def _check_scalar(item: Any, what: str) -> None:
    if isinstance(item, str):
        check_text(item, what)
    elif isinstance(item, int):
        if abs(item) >= 10**MAX_DIGITS:
            raise FormatError(f"{what}: an integer of more than {MAX_DIGITS} digits")
    elif isinstance(item, float):
        if not isfinite(item):
            raise FormatError(f"{what}: {item} is not JSON")
    elif item is not None:
        raise FormatError(f"{what}: {type(item).__name__} is not JSON")
