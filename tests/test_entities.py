"""Entities in tags, in every scheme, as the CoNLL scorer reads them."""

from __future__ import annotations

import random

import pytest

from deltakit.training.entities import entities, entity_metrics

PER2 = {("PER", 0, 1)}
TWO = {("PER", 0, 0), ("PER", 1, 1)}


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("", set()),
        ("O O", set()),
        ("B-PER I-PER O", PER2),  # IOB2
        ("I-PER I-PER O", PER2),  # IOB1, and what a model may say
        ("B-PER B-PER", TWO),  # IOB1 and IOB2: B starts anew
        ("I-PER B-PER", TWO),
        ("B-PER E-PER O", PER2),  # IOBES
        ("S-PER S-PER", TWO),
        ("B-PER L-PER U-LOC", PER2 | {("LOC", 2, 2)}),  # BILOU
        ("B-PER I-LOC", {("PER", 0, 0), ("LOC", 1, 1)}),  # another type starts anew
        ("E-PER I-PER", TWO),  # an end ends
        ("S-PER E-PER", TWO),
        ("PER PER LOC", PER2 | {("LOC", 2, 2)}),  # no prefixes
        ("B-A-B I-A-B", {("A-B", 0, 1)}),  # only the first dash ends the prefix
        ("O B-PER", {("PER", 1, 1)}),
    ],
)
def test_entities(tags: str, expected: set[tuple[str, int, int]]) -> None:
    """(type, first, last)."""
    assert entities(tags.split()) == expected


def test_schemes_agree() -> None:
    """The same entities written in IOB2 and IOBES are read alike."""
    choice = random.Random(0)
    for _ in range(200):
        spans, iob2, iobes = set(), [], []
        while len(iob2) < 12:
            length, kind = choice.randint(1, 4), choice.choice(["O", "PER", "LOC"])
            if kind == "O":
                iob2, iobes = [*iob2, "O"], [*iobes, "O"]
                continue
            spans.add((kind, len(iob2), len(iob2) + length - 1))
            iob2 += [f"B-{kind}"] + [f"I-{kind}"] * (length - 1)
            middle = [f"B-{kind}"] + [f"I-{kind}"] * (length - 2) + [f"E-{kind}"]
            iobes += [f"S-{kind}"] if length == 1 else middle
        assert entities(iob2) == entities(iobes) == spans


def test_scores_by_hand() -> None:
    """Of 3 found and 4 true entities 2 are right: type and both ends must agree."""
    pairs = [
        (["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "I-PER", "O", "B-PER"]),
        (["B-LOC", "O", "O"], ["B-LOC", "O", "B-LOC"]),
    ]
    found = entity_metrics(pairs)
    assert found == pytest.approx({"f1": 4 / 7, "precision": 2 / 3, "recall": 2 / 4})


def test_half_an_entity_is_none() -> None:
    """One end wrong."""
    assert entity_metrics([(["B-A", "O"], ["B-A", "I-A"])])["f1"] == 0.0


def test_nothing_to_find() -> None:
    """Counts as 0, as in seqeval."""
    assert entity_metrics([(["O"], ["O"])]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}
