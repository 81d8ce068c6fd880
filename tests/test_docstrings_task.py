"""The docstring task of the benchmarks: its splits are disjoint, reproducible and leak no names."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "docstrings.py"


@pytest.fixture(scope="module")
def docstrings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_docstrings", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(docstrings: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths: dict[str, Path] = docstrings.write(tmp_path_factory.mktemp("docstrings"))
    return paths


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_splits_share_no_words_and_hold_all_families(
    docstrings: ModuleType, written: dict[str, Path]
) -> None:
    assert list(written) == ["train", "validation", "test"]
    seen: set[str] = set()
    for path in written.values():
        rows = read(path)
        keys = [" ".join(re.findall(r"\w+", row["text"].lower())) for row in rows]
        assert len(set(keys)) == len(keys)
        assert seen.isdisjoint(keys)
        seen.update(keys)
        assert {row["label"] for row in rows} == set(docstrings.FAMILIES)
    assert len(seen) > 4000


def test_files_are_the_same_bytes_every_time(
    docstrings: ModuleType, written: dict[str, Path], tmp_path: Path
) -> None:
    again = docstrings.write(tmp_path)
    assert {n: p.read_bytes() for n, p in again.items()} == {
        n: p.read_bytes() for n, p in written.items()
    }


def test_no_module_belongs_to_two_families(docstrings: ModuleType) -> None:
    modules = [name for names in docstrings.FAMILIES.values() for name in names.split()]
    assert len(set(modules)) == len(modules)


def test_own_names_are_removed_as_whole_words_only(docstrings: ModuleType) -> None:
    text = "The asyncio.Queue of\n asyncio, not MyAsyncioThing; Asyncio_loop"
    assert (
        docstrings._without_names(text, {"asyncio"}) == "The .Queue of , not MyAsyncioThing; _loop"
    )


def test_missing_model_is_said(docstrings: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "MODEL_PACKAGE", "no_such_model_package")
    with pytest.raises(FileNotFoundError, match="no_such_model_package is not installed"):
        docstrings.minilm_directory()
