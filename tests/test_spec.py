"""The specification cannot rot: what it lists and shows is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from golden_deltas import FOLDER

import deltakit.formats
from deltakit.dtypes import BY_CODE
from deltakit.formats.codings import CODINGS
from deltakit.formats.header_json import _members
from deltakit.formats.record_json import COLUMNS

SPEC = Path(deltakit.formats.__file__).with_name("SPEC.md").read_text(encoding="utf-8")


def first_cells(heading: str) -> list[str]:
    """The first cells of the rows of the table whose head begins with `heading`."""
    table = SPEC.split(f"| {heading} |", 1)[1].split("\n\n", 1)[0]
    return re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)


def block(language: str) -> str:
    return SPEC.split(f"```{language}\n", 1)[1].split("\n```", 1)[0]


def test_the_example_is_a_file() -> None:
    assert bytes.fromhex(block("hex")) == (FOLDER / "v1-example.sdelta").read_bytes()


def test_the_header_of_the_example_is_shown() -> None:
    escaped = block("json").replace('"', '\\"')
    assert escaped.encode() in (FOLDER / "v1-example.sdelta").read_bytes()


def test_every_member_column_coding_and_dtype_is_described() -> None:
    assert set(first_cells("member")) == _members(2)[1]
    assert first_cells("column") == list(COLUMNS)
    assert first_cells("coding") == CODINGS.names()
    dtypes = SPEC.split("| code |", 1)[1].split("\n\n", 1)[0]
    pairs = re.findall(r"`([A-Z0-9_]+)` \| `(\w+)`", dtypes)
    assert dict(pairs) == {code: kind.name for code, kind in BY_CODE.items()}
