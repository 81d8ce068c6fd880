"""The page of a comparison: compare's own numbers, in bounded size, and a page that people can use."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_lab import Browser
from click.testing import CliRunner
from merge_reference import only
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

import deltakit as dk
from deltakit.cli.main import main
from deltakit.comparing.base_agreement import Agreement
from deltakit.comparing.compare import Compared, Comparison, Pair
from deltakit.comparing.overlap import Overlap
from deltakit.delta import TensorDelta
from deltakit.pages.comparison_page import comparison_page

HOSTILE = "</script><script>throw 1</script>\u202e.0.<b>"
MINUS = "\N{MINUS SIGN}"
LAYERS = [f"layer.{at}.{part}.weight" for at in range(3) for part in ("up", "down")]


def delta(seed: int) -> dk.SparseDelta:
    """Entries in most tensors, where those of other seeds are; odd seeds move them the other way."""
    rng = np.random.default_rng(seed)
    made = []
    for at, name in enumerate([*LAYERS, HOSTILE]):
        if at == seed:
            continue
        common = np.random.default_rng(at).choice(2000, 60, replace=False)
        indices = np.unique(np.concatenate([common[: 20 + 5 * seed], rng.choice(2000, 50)]))
        values = (-1) ** seed * rng.uniform(0.5, 1.0, len(indices)).astype(np.float32)
        made.append(
            TensorDelta(
                name=name,
                shape=(2000,),
                dtype="float32",
                mode="add",
                indices=indices.astype(np.int64),
                values=values,
            )
        )
    return only(*made)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three deltas in folders of their own."""
    folder = tmp_path_factory.mktemp("runs")
    made = [folder / name / "delta.sdelta" for name in ("news", "law", "code")]
    for seed, path in enumerate(made):
        path.parent.mkdir()
        dk.save(delta(seed), path)
    return made


@pytest.fixture(scope="module")
def page(files: list[Path]) -> Path:
    """Their page."""
    path = files[0].parents[1] / "page.html"
    path.write_text(comparison_page(dk.compare(files)), encoding="utf-8")
    return path


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    told: dict[str, Any] = json.loads(found[1])
    return told


def same(row: list[Any], overlap: Overlap) -> bool:
    """Counts to the last digit, what is a ratio or an estimate to three and a half."""
    *counts, cosine = row
    known = None if overlap.cosine is None else pytest.approx(overlap.cosine, rel=5e-4)
    expected = pytest.approx(overlap.expected, rel=5e-4)
    numbers = [overlap.first, overlap.second, overlap.shared, expected, overlap.signed]
    return counts == [*numbers, overlap.conflicts] and cosine == known


def test_numbers_are_those_of_compare(files: list[Path], page: Path) -> None:
    """In all, and by kind, block and tensor in natural order; files by what tells them apart."""
    found, told = dk.compare(files), data_of(page.read_text(encoding="utf-8"))
    assert [d["short"] for d in told["deltas"]] == ["news", "law", "code"]
    assert [d["label"] for d in told["deltas"]] == [str(path) for path in files]
    assert [d["entries"] for d in told["deltas"]] == [d.entries for d in found.deltas]
    assert (told["warning"], told["notes"]) == (found.warning, found.notes)
    assert [(p["first"], p["second"]) for p in told["pairs"]] == [(0, 1), (0, 2), (1, 2)]
    for pair, shown in zip(found.pairs, told["pairs"], strict=True):
        assert same(shown["total"], pair.total)
        assert (shown["base"], shown["evidence"]) == pair.base
        for part in told["parts"]:
            by = {"kind": pair.kinds, "block": pair.blocks, "tensor": pair.tensors}[part["by"]]
            assert part["others"] == 0
            assert set(part["names"]) >= set(by)
            for name, row in zip(part["names"], shown[part["by"]], strict=True):
                assert row is None if name not in by else same(row, by[name])
    blocks = ["layer.0", "layer.1", "layer.2"]
    assert told["parts"][1]["names"] == [HOSTILE.removesuffix(".<b>"), *blocks]


def _many(deltas: int, tensors: int) -> Comparison:
    """A comparison of many deltas that share more entries the later a tensor comes."""
    names = [f"model.layers.{at // 12}.self_attn.part_{at % 12}.weight" for at in range(tensors)]
    overlaps = {
        name: Overlap(first=123_456, second=65_432, shared=at, expected=at / 7, signed=at,
                      conflicts=at // 2, dot=-at / 3, first_squares=9e3, second_squares=8e3)
        for at, name in enumerate(names)
    }  # fmt: skip
    told = Agreement("unknown", "not every delta records its base")
    label = "some/where/far/away/in/a/folder/{}/delta.sdelta"
    return Comparison(
        deltas=tuple(
            Compared(label=label.format(at), entries=10**7, tensors=tensors) for at in range(deltas)
        ),
        pairs=tuple(
            Pair(first=one, second=other, base=told, tensors=overlaps)
            for one, other in combinations(range(deltas), 2)
        ),
    )


@pytest.mark.parametrize(("deltas", "tensors"), [(2, 20_000), (10, 1000), (30, 300)])
def test_pages_stay_small_and_say_what_they_leave_out(deltas: int, tensors: int) -> None:
    """What does not fit is counted together, so that the parts still add up to the whole."""
    found = _many(deltas, tensors)
    html = comparison_page(found)
    assert len(html.encode()) < 1_000_000
    told = data_of(html)
    kinds, _, finest = told["parts"]
    assert (len(kinds["names"]), kinds["others"]) == (12, 0)
    assert finest["others"] == tensors - len(finest["names"]) > 0
    kept = [int(name.split(".")[2]) * 12 + int(name.split("_")[-1].split(".")[0])
            for name in finest["names"]]  # fmt: skip
    assert sorted(kept) == list(range(tensors - len(kept), tensors))
    whole = found.pairs[0].total
    for by in ("kind", "block", "tensor"):
        for column, count in {0: whole.first, 2: whole.shared, 5: whole.conflicts}.items():
            assert sum(row[column] for row in told["pairs"][0][by] if row) == count
    assert len(told["notes"]) + told["more_notes"] == len(found.notes)


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


def test_command_writes_the_page_beside_whatever_else_it_tells(
    files: list[Path], page: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    html, plot = tmp_path / "out.html", tmp_path / "out.png"
    code, out, err = run("compare", *files, "--html", html, "--plot", plot, "--json")
    assert (code, err) == (0, f"Wrote {plot}.\nWrote {html}, a page for any browser.\n")
    assert len(json.loads(out)["pairs"]) == 3
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert html.read_bytes() == page.read_bytes()
    html.write_text("kept")
    code, out, err = run("compare", "none.sdelta", "none.sdelta", "--html", html)
    assert (code, out) == (1, "")
    assert err.startswith(f"Error: {html} exists; ")
    assert html.read_text() == "kept"
    assert run("compare", *files[:2], "--html", html, "--force")[0] == 0
    assert "Comparison of 2 deltas" in html.read_text(encoding="utf-8")


def test_command_needs_no_torch(files: list[Path], tmp_path: Path) -> None:
    arguments = ["compare", *map(str, files), "--html", str(tmp_path / "out.html"), "--json"]
    script = (
        "import sys; from deltakit.cli.main import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "assert not {'torch', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_clean(browser: Browser, page: Path, width: int, scheme: Any) -> None:
    """Nothing loaded, no error, no sideways scrolling of the page, nothing held against it."""
    browser.resize(width, 800)
    browser.scheme(scheme)
    browser.open(page)
    assert browser.text("h1") == "Comparison of 3 deltas"
    assert browser.requests() == browser.too_wide() == browser.violations() == []
    assert len(browser.all("table.heat")) == 4
    assert "collide" in browser.text(".warning")


def shown(browser: Browser) -> dict[str, list[str]]:
    """The table of the pair's parts: first cell -> the other texts."""
    rows = browser.run(
        "return [...document.querySelectorAll('#pair .scroll tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.textContent))"
    )
    return {row[0]: row[1:] for row in rows}


def test_a_click_on_a_cell_shows_that_pair(browser: Browser, page: Path, files: list[Path]) -> None:
    browser.open(page)
    assert browser.text("#pair h3") == "1 · news and 2 · law"
    heat = browser.all("table.heat")[2]
    heat.find_elements("css selector", "td[role=gridcell]")[3 * 2 + 1].click()
    assert browser.focused().text == "2 · law and 3 · code"
    assert Select(browser.one("#pair-choice")).first_selected_option.text == "2 · law and 3 · code"
    assert len(browser.all("td[aria-selected=true]")) == 2 * 4
    pair = dk.compare(files).pairs[2]
    rows = shown(browser)
    assert list(rows)[1:] == ["layer.*.down.weight", "layer.*.up.weight"]
    up = pair.kinds["layer.*.up.weight"]
    assert rows["layer.*.up.weight"][:2] == [str(up.first), str(up.second)]
    assert rows["layer.*.up.weight"][3] == str(up.shared)
    assert rows["layer.*.up.weight"][5] == str(up.conflicts)
    assert up.cosine is not None
    assert float(rows["layer.*.up.weight"][7].replace(MINUS, "-")) == pytest.approx(
        up.cosine, abs=5e-4
    )


def test_everything_can_be_done_with_the_keyboard(browser: Browser, page: Path) -> None:
    """One tab stop per matrix, arrows within; then parts and order as radio buttons."""
    browser.open(page)
    for _ in range(12):
        browser.press(Keys.TAB)
        if browser.focused().get_attribute("role") == "gridcell":
            break
    browser.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert "1 · news · 3 · code: " in browser.text(".readout:not(:empty)")
    browser.press(Keys.ENTER)
    assert browser.focused().text == "1 · news and 3 · code"
    browser.press(Keys.TAB, Keys.TAB, shift=True)  # back to the order, then to the parts
    assert browser.focused().accessible_name == "kind"
    browser.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    rows = shown(browser)
    assert set(LAYERS) <= set(rows)
    browser.press(Keys.TAB, Keys.ARROW_RIGHT)
    assert browser.focused().accessible_name == "most shared"
    counts = [int(cells[3]) for cells in shown(browser).values()]
    assert counts == sorted(counts, reverse=True)
    assert len(shown(browser)) == len(rows)
    browser.press(Keys.TAB, Keys.TAB, shift=True)
    assert browser.focused().get_attribute("id") == "pair-choice"
    browser.press(Keys.ARROW_UP)
    assert browser.text("#pair h3") == "1 · news and 2 · law"


@pytest.fixture
def adapters(files: list[Path], tmp_path: Path) -> Iterator[Path]:
    """A page on which the last two of three pairs are not compared entry by entry."""
    found = dk.compare(files)
    apart = [replace(p, tensors={}, apart="they are other adapters") for p in found.pairs[1:]]
    pairs = (found.pairs[0], apart[0], replace(apart[1], folded_cosine=-0.25))
    path = tmp_path / "adapters.html"
    path.write_text(comparison_page(replace(found, pairs=pairs)), encoding="utf-8")
    yield path


def test_adapters_are_said_to_stand_apart(browser: Browser, adapters: Path) -> None:
    browser.open(adapters)
    matrices = browser.all("table.heat")
    assert len(matrices) == 5
    cells = [cell.text for cell in matrices[-1].find_elements("css selector", "td[role=gridcell]")]
    assert cells == ["", "?", "?", "?", "", f"{MINUS}0.250", "?", f"{MINUS}0.250", ""]
    Select(browser.one("#pair-choice")).select_by_index(2)
    told = browser.text("#pair")
    assert "not compared one by one: they are other adapters" in told
    assert f"{MINUS}0.250" in told and "Shared entries" not in told
    assert browser.violations() == []


def test_thirty_deltas_are_drawn(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(comparison_page(_many(30, 300)), encoding="utf-8")
    browser.open(path)
    assert (
        len(browser.all("table.heat")[0].find_elements("css selector", "td[role=gridcell]")) == 900
    )
    browser.run("document.querySelectorAll('#pair input[type=radio]')[2].click()")
    assert "0 tensors with the most shared entries over all pairs are listed; 300 more" in (
        browser.text("#pair")
    )
    assert list(shown(browser)) == ["all others"]
    browser.resize(360, 800)
    assert browser.too_wide() == []
