"""Reading examples: files of rows, folders of them, folders of images, `datasets` ids."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltakit.errors import DataError, MissingFileError, nearest
from deltakit.training.image_folder import image_rows
from deltakit.training.readers import READERS, SPLIT_WORDS, Row, first_line


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one split.

    columns: names in order of first appearance; a row may lack some. origin: the file or id, for
    messages. class_names: column -> names of its integer classes, where the source knows them.
    numbers: the rows' numbers in the file, from 1, where they are not simply 1, 2, 3.
    """

    rows: Sequence[Row]
    columns: Sequence[str]
    origin: str
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    numbers: Sequence[int] = ()

    def numbered(self) -> Iterator[tuple[int, Row]]:
        """Every row with its number in the file, for messages."""
        return zip(self.numbers or range(1, len(self.rows) + 1), self.rows, strict=True)

    def keep(self, wanted: Sequence[bool]) -> Table:
        """The table of the rows that are wanted, which remember their numbers."""
        kept = [pair for pair, keep in zip(self.numbered(), wanted, strict=True) if keep]
        numbers, rows = [number for number, _ in kept], [row for _, row in kept]
        return Table(rows, self.columns, self.origin, self.class_names, numbers)


def read_splits(source: str, name: str | None = None) -> dict[str, Table]:
    """All splits of a data source: {"train": ..., "validation": ..., ...}.

    source: a file (one split, "train"), a folder with files such as train.jsonl and
    validation.jsonl, a folder of images (see `image_rows`), a folder saved by `datasets`, or a
    `datasets` id; a local path is preferred.
    name: the configuration of an id. Raises MissingFileError for a path that does not exist and
    DataError for what cannot be read.
    """
    path = Path(source)
    if path.is_file():
        return {"train": read_table(path)}
    if path.is_dir():
        if any((path / mark).is_file() for mark in ("dataset_dict.json", "dataset_info.json")):
            return _saved(path)
        return _folder(path)
    if path.suffix.lower() in READERS or source.startswith((".", "/", "~")):
        raise MissingFileError(f"data {source} does not exist")
    return _from_id(source, name)


def read_table(path: str | Path) -> Table:
    """One file's rows, told apart by its suffix; DataError names file, line and what is wrong."""
    file = Path(path)
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"data {file}: unknown kind of file; expected {', '.join(READERS)}")
    try:
        rows = list(reader(file))
    except UnicodeDecodeError as error:
        raise DataError(f"data {file}: not UTF-8 text at byte {error.start}") from None
    except OSError as error:
        raise MissingFileError(f"cannot read data {file}: {error.strerror or error}") from None
    return table_of(rows, str(file))


def table_of(rows: Sequence[Row], origin: str) -> Table:
    """A table of rows, with the columns found in any of them; DataError when there are none."""
    if not rows:
        raise DataError(f"data {origin}: holds no rows")
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    return Table(rows, list(columns), origin)


def choose_split(splits: Mapping[str, Table], name: str, origin: str) -> Table:
    """The split called `name`; DataError names those there are."""
    if name not in splits:
        found = ", ".join(splits)
        raise DataError(f"data {origin} has no split {name!r}; found {found}")
    return splits[name]


def check_columns(table: Table, *names: str | None) -> None:
    """Raise DataError for the first name that is no column, naming the columns there are."""
    for name in names:
        if name is not None and name not in table.columns:
            found = ", ".join(table.columns)
            hint = nearest(name, list(table.columns))
            raise DataError(f"data {table.origin} has no column {name!r}; found {found}{hint}")


def _folder(folder: Path) -> dict[str, Table]:
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in READERS)
    named: dict[str, list[Path]] = {}
    for file in files:
        word = re.split(r"[-_.]", file.stem.lower())[0]
        if word in SPLIT_WORDS:
            named.setdefault(SPLIT_WORDS[word], []).append(file)
    if not files:
        images = image_rows(folder)
        if images:
            return {split: table_of(rows, str(folder)) for split, rows in images.items()}
    if not named:
        found = ", ".join(f.name for f in files) or "no data files"
        raise DataError(f"data {folder}: expected train.jsonl or the like, found {found}")
    return {split: _joined([read_table(f) for f in parts]) for split, parts in named.items()}


def _joined(parts: list[Table]) -> Table:
    if len(parts) == 1:
        return parts[0]
    return table_of([row for part in parts for row in part.rows], parts[0].origin)


def _saved(folder: Path) -> dict[str, Table]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"data {folder}: {first_line(error)}") from None
    return _tables(loaded, str(folder))


def _from_id(source: str, name: str | None) -> dict[str, Table]:
    import datasets

    try:
        loaded = datasets.load_dataset(source, name)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"data {source!r} is neither a local path nor a `datasets` id that can be loaded: "
            f"{first_line(error)}"
        ) from None
    return _tables(loaded, source)


def _tables(loaded: Any, origin: str) -> dict[str, Table]:
    parts = loaded if isinstance(loaded, dict) else {"train": loaded}
    tables = {}
    for split, part in parts.items():
        # the classes of a column, or of the items of its lists
        features = {c: getattr(feature, "feature", feature) for c, feature in part.features.items()}
        names = {c: list(f.names) for c, f in features.items() if hasattr(f, "names")}
        table = table_of(part.to_list(), origin)
        tables[str(split)] = Table(table.rows, table.columns, table.origin, names)
    return tables
