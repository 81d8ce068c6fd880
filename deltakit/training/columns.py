"""Which columns a task uses: those asked for, or the usual names where they are unmistakable."""

from __future__ import annotations

from collections.abc import Sequence

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
