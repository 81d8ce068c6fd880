"""A comparison of deltas as one HTML page: matrices over all pairs, and each pair in its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from deltakit.comparing.compare import Comparison, Pair
from deltakit.comparing.overlap import Overlap
from deltakit.groups import natural_order
from deltakit.pages.page import page

_ROOM = 640_000  # bytes for the parts of all pairs; with all else a page stays below 1 MB
_ROW = 60  # bytes of one part of one pair as JSON, at most; most take half
_NOTES = 100  # as many as anybody reads
_PARTS: dict[str, Callable[[Pair], Mapping[str, Overlap]]] = {
    "kind": lambda pair: pair.kinds,
    "block": lambda pair: pair.blocks,
    "tensor": lambda pair: pair.tensors,
}


def comparison_page(found: Comparison) -> str:
    """The page, as text of at most about 1 MB.

    Of many deltas with many tensors the parts that share least are counted together, tensors first;
    the page says how many. Totals are those of all entries.
    """
    return page(f"Comparison of {len(found.deltas)} deltas", _data(found), "comparison.js")


def _data(found: Comparison) -> dict[str, Any]:
    """What comparison.js draws; overlaps as `_row` gives them."""
    labels = _short([delta.label for delta in found.deltas])
    pairs = [_described(pair) for pair in found.pairs]
    room = _ROOM
    parts = []
    for by, of in _PARTS.items():
        overlaps = [of(pair) for pair in found.pairs]
        kept, others = _kept(overlaps, room)
        room -= sum(_cost(name, len(pairs)) for name in kept)
        parts.append({"by": by, "names": kept, "others": others})
        for pair, members in zip(pairs, overlaps, strict=True):
            pair[by] = _rows(members, kept)
    return {
        "deltas": [
            {"label": d.label, "short": short, "entries": d.entries, "tensors": d.tensors}
            for d, short in zip(found.deltas, labels, strict=True)
        ],
        "pairs": pairs,
        "parts": parts,
        "warning": found.warning,
        "notes": found.notes[:_NOTES],
        "more_notes": max(0, len(found.notes) - _NOTES),
    }


def _described(pair: Pair) -> dict[str, Any]:
    total = pair.total
    return {
        "first": pair.first,
        "second": pair.second,
        "base": pair.base.verdict,
        "evidence": pair.base.why,
        "apart": pair.apart or None,
        "folded_cosine": _rounded(pair.folded_cosine),
        "unknown": total.unknown,
        "collision": _rounded(total.collision),
        "total": _row(total),
    }


def _short(labels: Sequence[str]) -> list[str]:
    """Labels without the ending, and without the folders and the file name that all have in common."""
    parts = [PurePath(label.removesuffix(".sdelta")).parts for label in labels]
    start, end = _alike(parts), _alike([each[::-1] for each in parts])
    return ["/".join(each[start : len(each) - end]) or each[-1] for each in parts]


def _alike(parts: Sequence[Sequence[str]]) -> int:
    """How many words all begin with."""
    told = (at for at, words in enumerate(zip(*parts, strict=False)) if len(set(words)) > 1)
    return next(told, min(map(len, parts)))


def _cost(name: str, pairs: int) -> int:
    """Bytes of a part: its name once, and a row in every pair."""
    return len(name.encode()) + 3 + _ROW * pairs


def _kept(overlaps: Sequence[Mapping[str, Overlap]], room: int) -> tuple[list[str], int]:
    """The parts with the most shared entries that fit into `room` bytes, in natural order, and how
    many are left out."""
    shared: dict[str, int] = {}
    for members in overlaps:
        for name, overlap in members.items():
            shared[name] = shared.get(name, 0) + overlap.shared
    kept = []
    for name in sorted(sorted(shared, key=natural_order), key=lambda name: -shared[name]):
        room -= _cost(name, len(overlaps))
        if room < 0:
            break
        kept.append(name)
    return sorted(kept, key=natural_order), len(shared) - len(kept)


def _rows(members: Mapping[str, Overlap], kept: Sequence[str]) -> list[list[Any] | None]:
    """A row for each kept part, None where neither delta has entries, and one of all others."""
    rows = [_row(members[name]) if name in members else None for name in kept]
    listed = set(kept)
    others = [overlap for name, overlap in members.items() if name not in listed]
    return [*rows, _row(Overlap.combined(others))] if others else rows


def _row(overlap: Overlap) -> list[Any]:
    """Counts, which the ratios follow from, and the cosine, which does not."""
    return [
        overlap.first,
        overlap.second,
        overlap.shared,
        _rounded(overlap.expected),
        overlap.signed,
        overlap.conflicts,
        _rounded(overlap.cosine),
    ]


def _rounded(number: float | None) -> float | None:
    """To four significant digits."""
    return None if number is None else float(f"{number:.4g}")
