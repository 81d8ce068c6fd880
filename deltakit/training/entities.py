"""Entities in sequences of tags, and their precision, recall and F1, as CoNLL counts them.

Tags are O, or a prefix and a type: B-PER, I-PER (IOB1, IOB2), E-PER and S-PER (IOBES; also L- and
U- of BILOU). A tag without a prefix counts as I-. One reading covers all schemes, that of the
CoNLL-2000 scorer conlleval (Tjong Kim Sang and Buchholz, 2000), which takes any sequence of tags.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_PREFIXES = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S"}


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first, last) of every entity in one sequence of tags."""
    found = set()
    start, before = 0, ("O", "")
    for at, tag in enumerate([*tags, "O"]):
        prefix, kind = _parts(tag)
        same = before[0] != "O" and prefix != "O" and kind == before[1]
        goes_on = same and prefix in "IE" and before[0] in "BI"
        if before[0] != "O" and not goes_on:
            found.add((before[1], start, at - 1))
        if not goes_on:
            start = at
        before = (prefix, kind)
    return found


def entity_metrics(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> dict[str, float]:
    """Micro-averaged F1, precision and recall over (predicted, true) sequences of tags.

    An entity is right when its type and both its ends are. What has no denominator counts as 0.
    """
    right = predicted = actual = 0
    for found, true in pairs:
        ours, theirs = entities(found), entities(true)
        right += len(ours & theirs)
        predicted += len(ours)
        actual += len(theirs)
    return {
        "f1": 2 * right / (predicted + actual) if right else 0.0,
        "precision": right / predicted if right else 0.0,
        "recall": right / actual if right else 0.0,
    }


def _parts(tag: str) -> tuple[str, str]:
    if tag == "O":
        return "O", ""
    prefix, dash, kind = tag.partition("-")
    return (_PREFIXES[prefix], kind) if dash and prefix in _PREFIXES else ("I", tag)
