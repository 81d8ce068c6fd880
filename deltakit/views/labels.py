"""Names of tensors, blocks and kinds, short enough to stand beside a figure."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH = 32  # letters


def shortened(names: Sequence[str]) -> list[str]:
    """The names without the beginning that all have in common, cut to their last parts.

    Whole dotted parts are cut, and `…` stands for them: at most 32 letters are left, unless two
    names would become one or the last part alone is longer.
    """
    parts = [name.split(".") for name in names]
    shared, most = 0, min((len(p) - 1 for p in parts), default=0)
    while len(parts) > 1 and shared < most and all(p[shared] == parts[0][shared] for p in parts):
        shared += 1
    if shared and any(p[shared] == "*" or p[shared].isdecimal() for p in parts):
        shared -= 1  # a number says nothing without the word before it
    told = [".".join(p[shared:]) for p in parts]
    short = [_end(name) for name in told]
    return short if len(set(short)) == len(set(told)) else told


def _end(name: str) -> str:
    if len(name) <= WIDTH:
        return name
    parts = name.split(".")
    while len(parts) > 1 and len(".".join(parts)) >= WIDTH:
        del parts[0]
    return "…" + ".".join(parts)
