"""Files of every released version are read for ever, and written again to the same bytes."""

from __future__ import annotations

from typing import Any

import pytest
from golden_deltas import FOLDER, golden
from safetensors import safe_open

from deltakit.delta import SparseDelta
from deltakit.formats.codings import CODINGS
from deltakit.formats.sdelta import SdeltaFile, encode, load

GOLDEN = golden()
every_file = pytest.mark.parametrize(
    ("name", "content", "how"), [(name, *row) for name, row in GOLDEN.items()], ids=list(GOLDEN)
)


def test_every_golden_file_is_described() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(GOLDEN)


def test_every_coding_has_a_golden_file() -> None:
    found = set()
    for name in GOLDEN:
        with SdeltaFile(FOLDER / f"{name}.sdelta") as file:
            found |= {record.coding for record in file.tensors.values()}
    assert found == set(CODINGS.names())


@every_file
def test_golden_files_hold_what_they_did(
    name: str, content: SparseDelta, how: dict[str, Any]
) -> None:
    assert load(FOLDER / f"{name}.sdelta").equals(content)


@every_file
def test_golden_files_are_written_to_the_same_bytes(
    name: str, content: SparseDelta, how: dict[str, Any]
) -> None:
    expected = (FOLDER / f"{name}.sdelta").read_bytes()
    assert encode(content, **how) == expected
    assert encode(load(FOLDER / f"{name}.sdelta"), **how) == expected


@every_file
def test_the_safetensors_library_opens_golden_files(
    name: str, content: SparseDelta, how: dict[str, Any]
) -> None:
    path = FOLDER / f"{name}.sdelta"
    with safe_open(path, framework="np") as file:
        assert list(file.metadata()) == ["sdelta"]
        streams = {key for key in file.keys() if key.startswith("sdelta.")}  # noqa: SIM118
        assert set(file.keys()) - streams == set(content.extras)
