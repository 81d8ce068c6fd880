"""Readers of data files, one per suffix: each gives rows and names the line of what is wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deltakit.errors import DataError

Row = Mapping[str, Any]

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}


def _jsonl(file: Path) -> Iterator[Row]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _object(line, f"{file} line {number}")


def _json(file: Path) -> Iterator[Row]:
    content = file.read_bytes()
    if content.lstrip()[:1] != b"[":
        yield from _jsonl(file)
        return
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise DataError(f"data {file}: not JSON: {error}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"data {file} item {number}: expected an object, found {row!r:.40}")
        yield row


def _object(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise DataError(f"data {where}: not UTF-8 text") from None
    except ValueError as error:
        raise DataError(f"data {where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"data {where}: expected an object, found {row!r:.40}")
    return row


def _separated(separator: str) -> Callable[[Path], Iterator[Row]]:
    def read(file: Path) -> Iterator[Row]:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=separator, strict=True)
            try:
                header = next(reader, [])
                if len(set(header)) < len(header):
                    raise DataError(f"data {file}: a column name stands twice in the first line")
                for cells in reader:
                    if cells and len(cells) != len(header):
                        raise DataError(
                            f"data {file} line {reader.line_num}: {len(cells)} fields, expected "
                            f"{len(header)} as in the first line"
                        )
                    if cells:
                        yield dict(zip(header, cells, strict=True))
            except csv.Error as error:
                raise DataError(f"data {file} line {reader.line_num}: {error}") from None

    return read


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"data {file}: not Parquet: {first_line(error)}") from None
    yield from rows


def _npz(file: Path) -> Iterator[Row]:
    import zipfile

    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"data {file}: not arrays without pickles: {first_line(error)}") from None
    counts = {name: len(array) if array.ndim else None for name, array in arrays.items()}
    if len(set(counts.values())) != 1 or None in counts.values():
        raise DataError(
            f"data {file}: expected arrays of one length, a row per item; found {counts}"
        )
    # one-dimensional arrays give plain Python values, as all other files do
    columns = {n: a.tolist() if a.ndim == 1 else a for n, a in arrays.items()}
    for cells in zip(*columns.values(), strict=True):
        yield dict(zip(columns, cells, strict=True))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for messages of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
    ".npz": _npz,
}
