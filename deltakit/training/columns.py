"""Which columns a task uses: those asked for, or the usual names where they are unmistakable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltakit.errors import DataError
from deltakit.training.data import Table, check_columns


def choose_columns(
    table: Table, given: Sequence[str | None], usual: Sequence[tuple[str, ...]]
) -> tuple[str, ...]:
    """The columns given, or the first group of usual names that the table has in full.

    Raises DataError when a given name is no column or no usual group is there.
    """
    asked = tuple(name for name in given if name is not None)
    if asked:
        check_columns(table, *asked)
        return asked
    for group in usual:
        if all(name in table.columns for name in group):
            return group
    expected = " or ".join("+".join(group) for group in usual)
    found = ", ".join(table.columns)
    raise DataError(
        f"data {table.origin}: expected a column {expected}, found {found}; name it by a setting"
    )


def texts_of(table: Table, column: str) -> list[str]:
    """A column of texts; DataError names the first row that has none."""
    check_columns(table, column)
    texts = []
    for number, row in table.numbered():
        value = row.get(column)
        if not isinstance(value, str):
            raise DataError(
                f"data {table.origin} row {number}: expected text in column {column!r}, "
                f"found {value!r:.40}"
            )
        texts.append(value)
    return texts


def answers_of(table: Table, column: str) -> list[list[str]]:
    """A column of texts of which each may be a list of equally right ones: always as lists.

    SQuAD's {"text": [...]} is read too. DataError names the first row that has none.
    """
    check_columns(table, column)
    answers = []
    for number, row in table.numbered():
        value = row.get(column)
        texts: Any = value.get("text") if isinstance(value, dict) else value
        texts = [texts] if isinstance(texts, str) else texts
        if not _are_texts(texts):
            raise DataError(
                f"data {table.origin} row {number}: expected text or texts in column {column!r}, "
                f"found {value!r:.40}"
            )
        answers.append(texts)
    return answers


def choices_of(table: Table, choices: str, answer: str) -> tuple[list[list[str]], list[int]]:
    """Columns of options and of the right one: the options' texts, and its place among them.

    Options are a list of texts, or {"text": [...], "label": [...]} as in ARC. The right one is
    given by its place from 0, by its label, or by its text. DataError names the first row where
    it is none of these.
    """
    check_columns(table, choices, answer)
    texts, right = [], []
    for number, row in table.numbered():
        value, found = row.get(choices), row.get(answer)
        options: Any = value.get("text") if isinstance(value, dict) else value
        names = value.get("label") if isinstance(value, dict) else None
        where = f"data {table.origin} row {number}"
        if not _are_texts(options) or len(options) < 2 or not all(options):
            raise DataError(
                f"{where}: expected two texts or more in column {choices!r}, found {value!r:.40}"
            )
        places = [place for place, name in enumerate(names or options) if name == found]
        if type(found) is int and 0 <= found < len(options):
            places = [found]
        if len(places) != 1:
            raise DataError(
                f"{where}: expected one of the {len(options)} options in column {answer!r}, by its "
                f"place from 0, its label or its text; found {found!r:.40}"
            )
        texts.append(options)
        right.append(places[0])
    return texts, right


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
