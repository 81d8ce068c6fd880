"""Train and validation splits: taken as they are, or made the same way every time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.errors import DataError
from deltakit.training.data import Table, choose_split
from deltakit.training.readers import Row


@dataclass(frozen=True, slots=True)
class Splits:
    """The rows to train on and to evaluate on, and how they came about (for metrics.json)."""

    train: Table
    validation: Table | None
    record: Mapping[str, Any]


def make_splits(
    splits: Mapping[str, Table],
    origin: str,
    *,
    train: str = "train",
    validation: str = "validation",
    fraction: float = 0.1,
) -> Splits:
    """The two splits of a data source.

    Where there is no validation split, about `fraction` of the training rows are held out by
    content (see `hold_out`); 0 holds out nothing. A validation split that was asked for under
    another name than the default must exist. Raises DataError.
    """
    chosen = choose_split(splits, train, origin)
    if validation in splits:
        if validation == train:
            raise DataError(f"data {origin}: split {train!r} cannot be both trained and validated")
        return _recorded(chosen, splits[validation], "given", {"names": [train, validation]})
    if validation != "validation":
        choose_split(splits, validation, origin)
    if fraction == 0:
        return _recorded(chosen, None, "none", {})
    kept, held = hold_out(chosen, fraction)
    return _recorded(kept, held, "held out by content", {"fraction": fraction})


def hold_out(table: Table, fraction: float) -> tuple[Table, Table]:
    """Split rows into (kept, held out), both in their order in the file.

    Rows are ranked by the sha256 of their content, and the first max(1, round(fraction * rows))
    are held out: the same on every machine, in every order of the rows, without a seed. Rows of
    equal content stay together, so none is trained on and evaluated on. Raises DataError when
    either side would be empty.
    """
    digests = [_digest(row) for row in table.rows]
    rank = max(1, round(fraction * len(digests)))
    last = sorted(digests)[rank - 1]
    if max(digests) <= last:
        raise DataError(
            f"data {table.origin}: {len(digests)} rows are too few different ones to hold out a "
            "validation split; give one, or set validation_fraction to 0"
        )
    kept = table.keep([digest > last for digest in digests])
    return kept, table.keep([digest <= last for digest in digests])


def _digest(row: Row) -> bytes:
    return sha256(json.dumps(row, sort_keys=True, default=_content).encode()).digest()


def _content(value: Any) -> Any:
    """What stands for a value that JSON does not have: of files and arrays, what is in them."""
    if isinstance(value, Path):
        return sha256(value.read_bytes()).hexdigest()
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        return [array.dtype.str, list(array.shape), sha256(array.tobytes()).hexdigest()]
    return str(value)


def _recorded(train: Table, validation: Table | None, how: str, more: dict[str, Any]) -> Splits:
    record = {"how": how, **more, "train_rows": len(train.rows)}
    if validation is not None:
        record["validation_rows"] = len(validation.rows)
        both = b"".join(_digest(row) for row in validation.rows)
        record["validation_sha256"] = sha256(both).hexdigest()
    return Splits(train, validation, record)
