"""Reading data: every source gives the same rows, and every mistake one line that finds it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tiny_models import colour_rows, write_jsonl

from deltakit.errors import DataError, MissingFileError
from deltakit.training.data import Table, read_splits, read_table, table_of
from deltakit.training.splits import hold_out, make_splits

ROWS = [{"text": 'a, "b"', "label": "x"}, {"text": "ü\nline", "label": "y"}]


def _csv(path: Path, separator: str) -> None:
    lines = [["text", "label"], *([r["text"], r["label"]] for r in ROWS)]
    quoted = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in line] for line in lines]
    path.write_text("".join(separator.join(line) + "\n" for line in quoted), encoding="utf-8-sig")


def _write(path: Path) -> None:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        _csv(path, "," if path.suffix == ".csv" else "\t")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    """Quotes, commas, line ends and umlauts survive; so does a byte-order mark in a CSV."""
    path = tmp_path / f"data{suffix}"
    _write(path)
    table = read_table(path)
    assert [dict(row) for row in table.rows] == ROWS
    assert list(table.columns) == ["text", "label"]


def test_json_lines_in_a_json_file(tmp_path: Path) -> None:
    """A .json file may hold a list or lines."""
    assert len(read_table(write_jsonl(tmp_path / "a.json", ROWS)).rows) == 2


def test_folder_with_split_files(tmp_path: Path) -> None:
    """Split names are told from file names; several files of one split are one table."""
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", ROWS[1:])
    write_jsonl(tmp_path / "dev.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("not data")
    splits = read_splits(str(tmp_path))
    assert {name: len(table.rows) for name, table in splits.items()} == {
        "train": 2,
        "validation": 1,
    }


@pytest.mark.parametrize("several", [True, False])
def test_folder_saved_by_datasets(several: bool, tmp_path: Path) -> None:
    """A saved DatasetDict or Dataset, with the names of its classes."""
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
    )
    rows = {"text": ["a", "b"], "label": [1, 0]}
    one = datasets.Dataset.from_dict(rows, features=features)
    saved = datasets.DatasetDict({"train": one, "test": one}) if several else one
    saved.save_to_disk(str(tmp_path / "saved"))
    splits = read_splits(str(tmp_path / "saved"))
    assert list(splits) == (["train", "test"] if several else ["train"])
    assert [dict(r) for r in splits["train"].rows] == [
        {"text": "a", "label": 1},
        {"text": "b", "label": 0},
    ]
    assert splits["train"].class_names == {"label": ["no", "yes"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": }\n', "a.jsonl line 2: not JSON"),
        ("a.jsonl", '{"a": 1}\n\n[1]\n', r"a.jsonl line 3: expected an object, found \[1\]"),
        ("a.jsonl", "\n\n", "a.jsonl: holds no rows"),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl line 1: not UTF-8 text"),
        ("a.json", "[1]", "a.json item 1: expected an object, found 1"),
        ("a.json", "[{]", "a.json: not JSON"),
        ("a.csv", "a,b\n1,2\n3\n", "a.csv line 3: 1 fields, expected 2"),
        ("a.csv", "a,a\n1,2\n", "a.csv: a column name stands twice"),
        ("a.csv", 'a,b\n1,"2\n', "a.csv line 2: unexpected end of data"),
        ("a.csv", b"a,b\n1,\xff\n", "a.csv: not UTF-8 text"),
        ("a.csv", "a,b\n", "a.csv: holds no rows"),
        ("a.parquet", "no", "a.parquet: not Parquet"),
        ("a.txt", "x", r"a.txt: unknown kind of file; expected .jsonl, .json, .csv"),
    ],
)
def test_unreadable_file(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    """File, line and reason, in one line."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        read_splits(str(path))
    assert "\n" not in str(caught.value)


def test_folder_without_splits(tmp_path: Path) -> None:
    """A folder is not guessed at."""
    write_jsonl(tmp_path / "stories.jsonl", ROWS)
    with pytest.raises(DataError, match=r"expected train.jsonl or the like, found stories.jsonl"):
        read_splits(str(tmp_path))


def test_missing_path(tmp_path: Path) -> None:
    """A path that does not exist is not looked for on the Hub."""
    with pytest.raises(MissingFileError, match=r"gone\.jsonl does not exist"):
        read_splits(str(tmp_path / "gone.jsonl"))


def test_unknown_id_offline() -> None:
    """One line instead of a traceback."""
    with pytest.raises(DataError, match="'no-such/data' is neither a local path nor") as caught:
        read_splits("no-such/data")
    assert "\n" not in str(caught.value)


def _table(rows: list[dict[str, Any]]) -> Table:
    return table_of(rows, "rows")


def _contents(table: Table) -> list[str]:
    return sorted(json.dumps(row) for row in table.rows)


def test_hold_out_depends_on_content_only() -> None:
    """The same rows are held out whatever their order, and equal rows stay together."""
    rows = colour_rows(200)
    shuffled = random.Random(1).sample(rows, len(rows))
    kept, held = hold_out(_table(rows), 0.1)
    again, held_again = hold_out(_table(shuffled), 0.1)
    assert _contents(held) == _contents(held_again)
    assert _contents(kept) == _contents(again)
    assert not set(_contents(kept)) & set(_contents(held))
    assert len(kept.rows) + len(held.rows) == 200


def test_hold_out_counts_exactly_where_rows_differ() -> None:
    """round(fraction * rows), at least one; rows remember their numbers in the file."""
    rows = [{"text": str(number)} for number in range(25)]
    for fraction, count in ((0.1, 2), (0.5, 12), (0.001, 1)):
        kept, held = hold_out(_table(rows), fraction)
        assert len(held.rows) == count
        numbers = dict(list(held.numbered()) + list(kept.numbered()))
        assert numbers == {n + 1: row for n, row in enumerate(rows)}


@pytest.mark.parametrize("count", [1, 5])
def test_hold_out_needs_two_different_rows(count: int) -> None:
    """Nothing is left to train on otherwise."""
    with pytest.raises(DataError, match="too few different ones to hold out"):
        hold_out(_table([{"text": "same"}] * count), 0.1)


def test_splits_are_taken_as_they_are() -> None:
    """A validation split that exists is used whole, and recorded."""
    tables = {"train": _table(ROWS), "validation": _table(ROWS[:1])}
    splits = make_splits(tables, "data")
    assert splits.train is tables["train"]
    assert splits.validation is tables["validation"]
    assert splits.record["how"] == "given"
    assert (splits.record["train_rows"], splits.record["validation_rows"]) == (2, 1)


def test_splits_by_other_names() -> None:
    """Names are exact; what is missing is named with what there is."""
    tables = {"a": _table(ROWS), "b": _table(ROWS)}
    assert make_splits(tables, "d", train="a", validation="b").validation is tables["b"]
    with pytest.raises(DataError, match="data d has no split 'train'; found a, b"):
        make_splits(tables, "d")
    with pytest.raises(DataError, match="data d has no split 'c'; found a, b"):
        make_splits(tables, "d", train="a", validation="c")
    with pytest.raises(DataError, match="cannot be both trained and validated"):
        make_splits(tables, "d", train="a", validation="a")


def test_nothing_held_out() -> None:
    """A fraction of 0 means what it says."""
    splits = make_splits({"train": _table(ROWS)}, "d", fraction=0)
    assert splits.validation is None
    assert splits.record == {"how": "none", "train_rows": 2}
