"""docs/extending.md works as it stands: its files, its lines of registration and its rows of tests.

Every file it shows is loaded under the name that it would have, every line is run where it would
stand, and the laws of the tests that it names are asked of its rows.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import test_codings
import test_combine
import test_method_laws
import test_step_scores
from click.testing import CliRunner
from stack_reference import DENSE

from deltakit.cli.main import COMMANDS, main
from deltakit.combine import METHODS as STACKING
from deltakit.formats.bridges import BRIDGES
from deltakit.formats.codings import CODINGS
from deltakit.selection import HEURISTICS, METHODS
from deltakit.training.presets import DEFAULTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(r'^```(\w+)(?: title="(.*?)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
TABLES: dict[str, dict[str, Any]] = {  # files whose rows the page shows
    "cli/main.py": COMMANDS,
    "deltakit/training/presets.py": DEFAULTS,
    "tests/stack_reference.py": DENSE,
    "tests/test_codings.py": test_codings.SUPPORTS,
    "tests/test_combine.py": test_combine.ORACLES,
}


class Tree:
    """The repository as it is with what the page adds, until the test ends."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.added: dict[str, Any] = {}  # the names that new files bring
        self.rows: dict[str, Any] = {}  # title -> the rows of its table
        self.used: dict[str, Any] = {}  # the names of blocks without a file
        for registry in (HEURISTICS, METHODS, STACKING, CODINGS, BRIDGES):
            monkeypatch.setattr(registry, "_records", dict(registry._records))  # type: ignore[attr-defined]

    def take(self, title: str, text: str) -> None:
        """One block of Python."""
        if not title:
            self.used = self._run(text, self.used)
        elif not (ROOT / title).exists():
            self._load(title, text)
        elif title in TABLES:
            rows = eval(f"{{{text}}}", {**self._names(title), **self.added})
            self.rows[title] = rows
            for key, row in rows.items():
                self.monkeypatch.setitem(TABLES[title], key, row)
        elif title.startswith("tests/"):
            self.rows[title] = eval(f"[{text}]", {**self._names(title), **self.added})
        else:
            self._run(text, self._names(title))

    def _run(self, text: str, names: dict[str, Any]) -> dict[str, Any]:
        path = self.folder / "block.py"
        path.write_text(text)
        return runpy.run_path(str(path), names)

    def _load(self, title: str, text: str) -> None:
        name = _module(title)
        path = self.folder / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        self.monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        package, _, stem = name.rpartition(".")
        self.monkeypatch.setattr(sys.modules[package], stem, module, raising=False)
        self.added |= {key: value for key, value in vars(module).items() if key[0] != "_"}

    def _names(self, title: str) -> dict[str, Any]:
        return dict(vars(importlib.import_module(_module(title))))


def _module(title: str) -> str:
    parts = title.removesuffix(".py").removesuffix("/__init__").split("/")
    if parts[0] in ("cli", "formats"):
        parts.insert(0, "deltakit")
    return ".".join(parts[1:] if parts[0] == "tests" else parts)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.chdir(tmp_path)
    made = Tree(tmp_path, monkeypatch)
    for kind, title, text in BLOCK.findall(PAGE):
        if kind == "python":
            made.take(title, text)
    return made


def test_what_the_page_adds_meets_the_laws(tree: Tree) -> None:
    assert "outward" in HEURISTICS.names() and "outward" in METHODS.names()
    assert "holders" in STACKING.names()
    assert "stride" in CODINGS.names() and "csv-entries" in BRIDGES.names()
    (row,) = tree.rows["tests/test_step_scores.py"]
    test_step_scores.test_step_scores_equal_their_formula_and_their_bound_drops_no_winner(*row)
    test_step_scores.test_the_first_step_chooses_by_its_own_gradient(*row)
    (method,) = tree.rows["deltakit/training/presets.py"]
    test_method_laws.test_every_method_meets_its_budget_and_moves_only_chosen_entries(method)
    for name, cases in tree.rows["tests/test_combine.py"].items():
        for case in cases:
            test_combine.test_numbers_worked_by_hand(name, *case)
        test_combine.test_equals_the_naive_dense_form(name=name, flavour="paper")
    for name, supports in tree.rows["tests/test_codings.py"].items():
        for case in supports:
            test_codings.test_decoding_gives_the_indices_back(name, case)
            test_codings.test_missing_and_added_bytes_are_refused(name, case)
            test_codings.test_flipped_bits_give_an_error_or_a_valid_support(name, case)
            test_codings.test_a_smaller_tensor_gives_an_error_or_a_valid_support(name, case)
            for change in (-1, 1, 2**40):
                test_codings.test_a_wrong_count_gives_an_error_or_a_valid_support(
                    name, case, change
                )


def test_the_command_prints_what_the_page_shows(tree: Tree) -> None:
    shown = [(kind, text) for kind, _, text in BLOCK.findall(PAGE) if kind != "python"]
    ((_, line), (_, expected)) = shown
    result = CliRunner().invoke(main, shlex.split(line)[1:])
    assert (result.exit_code, result.output) == (0, expected)
    assert "entries" in CliRunner().invoke(main, ["--help"]).output
