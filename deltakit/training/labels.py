"""Labels: told apart as classes or numbers, and fitted to the classes of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltakit.errors import DataError, nearest
from deltakit.training.data import Table, check_columns
from deltakit.training.task import Head

Raw = Mapping[str, list[Any]]  # split -> labels as they stand in the data


@dataclass(frozen=True, slots=True)
class Labels:
    """Labels of every split: class numbers or floats; names of the classes (one for a number)."""

    values: Mapping[str, list[Any]]
    names: Sequence[str]
    summary: str


def raw_labels(table: Table, column: str) -> list[Any]:
    """A column of labels, numbers in text read as numbers; DataError for a row without one."""
    check_columns(table, column)
    labels = []
    for number, row in table.numbered():
        label = row.get(column)
        if not isinstance(label, (str, int, float)) or str(label) in ("", "nan"):
            raise DataError(
                f"data {table.origin} row {number}: expected a label in column {column!r}, "
                f"found {label!r:.40}"
            )
        labels.append(int(label) if isinstance(label, bool) else label)
    return labels


def is_regression(raw: Raw, asked: str | None, head: Head | None) -> bool:
    """Whether labels are numbers: as asked, as the model's head has it, or all labels floats."""
    if asked is not None:
        return asked == "regression"
    if head is not None:
        return head.problem_type == "regression" or len(head.names) == 1
    every = [label for labels in raw.values() for label in labels]
    return _as(int, every) is None and _as(float, every) is not None


def real_labels(raw: Raw, tables: Mapping[str, Table], head: Head | None) -> Labels:
    """Labels as floats; DataError for one that is no number, or a head of several classes."""
    if head is not None and len(head.names) != 1:
        raise DataError(f"the model's head has {len(head.names)} labels; a regression needs 1")
    values = {}
    for split, labels in raw.items():
        for (number, _), label in zip(tables[split].numbered(), labels, strict=True):
            if _as(float, [label]) is None:
                raise DataError(
                    f"data {tables[split].origin} row {number}: label {label!r} is no number"
                )
        values[split] = [float(label) for label in labels]
    return Labels(values, head.names if head else _generic(1), "numbers")


def class_labels(
    raw: Raw,
    tables: Mapping[str, Table],
    class_names: Sequence[str] | None,
    count: int | None,
    head: Head | None,
) -> Labels:
    """Labels as class numbers.

    Integer labels are class numbers already; texts are numbered by the head's names where those
    are known, else in sorted order. count: the number of classes asked for. Raises DataError,
    with the row, for a label outside the model's range.
    """
    if head is not None and count is not None and count != len(head.names):
        raise DataError(f"num_labels is {count}, but the model's head has {len(head.names)} labels")
    raw = {split: [_whole(label) for label in labels] for split, labels in raw.items()}
    every = [label for labels in raw.values() for label in labels]
    numbers = _as(int, every)
    if numbers is None:
        names = _text_names([str(label) for label in every], count, head)
        lookup: dict[Any, int] = {name: number for number, name in enumerate(names)}
        read: Any = str
    else:
        names = _number_names(max(numbers), len(every), class_names, count, head)
        lookup = {number: number for number in range(len(names))}
        read = int
    values = {s: _numbered(labels, lookup, read, tables[s]) for s, labels in raw.items()}
    used = len({number for numbers in values.values() for number in numbers})
    unused = f" ({len(names) - used} of them never used)" if used < len(names) else ""
    return Labels(values, names, f"{len(names)} classes{unused}")


def _number_names(
    highest: int, rows: int, known: Sequence[str] | None, count: int | None, head: Head | None
) -> list[str]:
    if head is not None:
        return list(head.names)
    total = count or (len(known) if known else max(highest + 1, 2))
    if total > max(rows, 2) and count is None and not known:
        raise DataError(
            f"label {highest} needs {total} classes, more than the {rows} rows; is that the label "
            "column? If it is, set num_labels"
        )
    return list(known) if known and len(known) == total else _generic(total)


def _text_names(labels: list[str], count: int | None, head: Head | None) -> list[str]:
    found = sorted(set(labels))
    if head is not None and list(head.names) != _generic(len(head.names)):
        return list(head.names)
    total = len(head.names) if head else count or max(len(found), 2)
    if len(found) > total:
        raise DataError(
            f"the data has {len(found)} different labels, the model {total}: "
            f"{', '.join(found[:8])}{', ...' if len(found) > 8 else ''}"
        )
    return found + _generic(total)[len(found) :]


def _numbered(labels: list[Any], lookup: dict[Any, int], read: Any, table: Table) -> list[int]:
    numbers = []
    for (row, _), label in zip(table.numbered(), labels, strict=True):
        number = lookup.get(read(label))
        if number is None:
            names = [str(name) for name in lookup]
            span = f"0 to {len(names) - 1}" if read is int else ", ".join(names[:8])
            raise DataError(
                f"data {table.origin} row {row}: label {label!r} is outside the model's range of "
                f"{len(names)} labels ({span}){nearest(str(label), names) if read is str else ''}"
            )
        numbers.append(number)
    return numbers


def _generic(count: int) -> list[str]:
    return [f"LABEL_{number}" for number in range(count)]


def _whole(label: Any) -> Any:
    return int(label) if isinstance(label, float) and label.is_integer() else label


def _as(kind: type[int | float], labels: list[Any]) -> list[Any] | None:
    """All labels as int or float, or None when one of them is something else."""
    if kind is int and any(isinstance(label, float) for label in labels):
        return None
    try:
        return [kind(label) for label in labels]
    except ValueError:
        return None
