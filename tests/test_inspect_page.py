"""The page of a delta: its own numbers in bounded size, for every sort of delta, usable by anyone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_lab import Browser
from click.testing import CliRunner
from inspect_page_deltas import HOSTILE, deltas, joined, layers, tensor
from selenium.webdriver.common.keys import Keys

from deltakit.cli.main import main
from deltakit.delta import SparseDelta
from deltakit.formats.sdelta import save
from deltakit.inspection import Inspection, inspect
from deltakit.pages.delta_page import delta_page
from deltakit.pages.page import write_page
from deltakit.views.delta_view import DeltaView

SORTS = deltas()


def inspected(delta: SparseDelta, folder: Path) -> Inspection:
    path = folder / "delta.sdelta"
    save(delta, path)
    return inspect(path)


def document(found: Inspection) -> str:
    return delta_page(found, DeltaView.of(found))


def data_of(text: str) -> Any:
    [data] = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(data)


def opened(browser: Browser, found: Inspection, folder: Path) -> Browser:
    write_page(folder / "delta.html", document(found))
    browser.open(folder / "delta.html")
    return browser


@pytest.mark.parametrize("sort", SORTS)
def test_every_entry_is_told_once_in_every_view(sort: str, tmp_path: Path) -> None:
    delta = SORTS[sort]
    told = data_of(document(inspected(delta, tmp_path)))
    tensors = told["tensors"]
    assert tensors["name"] == list(delta.tensors)
    assert tensors["entries"] == [each.nnz for each in delta.tensors.values()]
    assert sum(cell[2] for cell in told["grid"]["cells"]) == told["entries"] == delta.nnz
    assert sorted(at for cell in told["grid"]["cells"] for at in cell[5]) == list(
        range(len(delta.tensors))
    )
    for histogram, count in [
        (told["histogram"], delta.nnz),
        *zip(tensors["histogram"], tensors["entries"], strict=True),
    ]:
        rest = histogram["zeros"] + histogram["unknown"] + histogram["non_finite"]
        assert sum(histogram["positive"]) + sum(histogram["negative"]) + rest == count
    for each, count in zip(tensors["occupancy"], tensors["entries"], strict=True):
        assert sum(each["rows"]) == sum(each["columns"]) == sum(map(sum, each["cells"])) == count


def test_kinds_beyond_the_sixth_are_one_line(tmp_path: Path) -> None:
    order = np.arange(30)
    delta = joined(*(tensor(f"part{at}.weight", (20, 30), 30, order=order) for at in range(9)))
    told = data_of(document(inspected(delta, tmp_path)))["unmasking"]["kinds"]
    assert len(told) == 7
    assert told["3 other kinds"][-1] == 90
    assert sum(counts[-1] for counts in told.values()) == delta.nnz


@pytest.mark.parametrize(
    ("count", "entries"), [(1000, 1000), (60, 20_000)], ids=["thousand-tensors", "million-entries"]
)
def test_a_page_stays_below_a_megabyte(count: int, entries: int, tmp_path: Path) -> None:
    delta = joined(
        *(
            tensor(f"model.layers.{at}.mlp.down_proj.weight", (256, 512), entries)
            for at in range(count)
        )
    )
    assert len(document(inspected(delta, tmp_path)).encode()) < 1_000_000


def test_of_a_header_alone_nothing_else_is_told(tmp_path: Path) -> None:
    found = replace(inspected(SORTS["layers"], tmp_path), remote=True)
    found.path.unlink()  # type: ignore[union-attr]
    told = data_of(document(found))
    assert told["histogram"] is told["unmasking"] is told["run"] is told["changes"] is None
    assert told["tensors"]["histogram"] == told["tensors"]["occupancy"] == []
    assert all(cell[4] is None for cell in told["grid"]["cells"])


def test_the_run_is_told_where_the_delta_lies_in_one(tmp_path: Path) -> None:
    def measured(entries: int, name: str) -> dict[str, Any]:
        return {"entries": entries, "step": 5, "path": name, "metrics": {"accuracy": 0.5}}

    record = {
        "method": "id3",
        "task": "t",
        "metric": "accuracy",
        "marks": [measured(100, "budget-100.sdelta")],
        "final": measured(200, "delta.sdelta"),
    }
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    told = data_of(document(inspected(SORTS["layers"], tmp_path)))["run"]
    assert (told["entries"], told["values"], told["at"]) == ([100, 200], [0.5, 0.5], 1)


def test_the_command_writes_the_page_and_prints_the_report_as_before(tmp_path: Path) -> None:
    found = inspected(SORTS["layers"], tmp_path)
    plain = CliRunner().invoke(main, ["inspect", str(found.path)])
    command = ["inspect", str(found.path), "--html", str(tmp_path / "a.html")]
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, done.stdout) == (0, plain.stdout)
    assert done.stderr == f"Wrote {tmp_path / 'a.html'}.\n"
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == document(found)
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 1 and "--force" in again.stderr
    forced = CliRunner().invoke(main, [*command, "--force", "--json"])
    assert json.loads(forced.stdout) == json.loads(json.dumps(found.as_dict()))


def test_writing_the_page_loads_no_torch_and_no_matplotlib(tmp_path: Path) -> None:
    path = inspected(SORTS["layers"], tmp_path).path
    code = (
        "import sys\nfrom deltakit.cli.main import main\n"
        f"main(['inspect', {str(path)!r}, '--html', {str(tmp_path / 'a.html')!r}],"
        " standalone_mode=False)\nassert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_delta_itself_is_never_replaced(tmp_path: Path) -> None:
    path = str(inspected(SORTS["layers"], tmp_path).path)
    done = CliRunner().invoke(main, ["inspect", path, "--html", path, "--force"])
    assert done.exit_code == 1 and "is a delta to be read" in done.stderr
    assert inspect(path).entries == SORTS["layers"].nnz


@pytest.mark.parametrize("sort", [*SORTS, "header"])
def test_every_sort_is_drawn_for_everyone(sort: str, browser: Browser, tmp_path: Path) -> None:
    """Light, dark and narrow, with a tensor open: no rule of axe is broken, nothing is loaded."""
    found = inspected(SORTS.get(sort, SORTS["layers"]), tmp_path)
    page = opened(browser, replace(found, remote=sort == "header"), tmp_path)
    if cells := page.all("td[role=gridcell]:not(.none)"):
        cells[0].click()
        assert page.text(".detail .bar h3") != ""
    assert page.violations() == page.requests() == page.too_wide() == []
    page.scheme("dark")
    page.resize(360, 740)
    assert page.violations() == page.too_wide() == []


def test_cards_and_cells_show_the_numbers_of_the_delta(browser: Browser, tmp_path: Path) -> None:
    found = inspected(SORTS["layers"], tmp_path)
    page = opened(browser, found, tmp_path)
    assert page.all(".cards dd")[0].text == f"{found.entries:,}"
    cells = page.all("tbody tr:first-child td[role=gridcell]")
    first = [t for t in found.tensors if t.name.startswith("model.layers.0.")]
    assert [cell.text for cell in cells] == [f"{100 * t.nnz / t.numel:.3g} %" for t in first]


def test_a_tensor_opens_by_pointer_and_closes_again(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, inspected(SORTS["layers"], tmp_path), tmp_path)
    page.all("td[role=gridcell]")[1].click()
    assert page.text(".detail .bar h3") == "model.layers.0.norm.weight"
    page.one(".detail .bar button").click()
    assert page.all(".detail .bar h3") == []


def test_a_tensor_opens_by_keys_and_gives_the_focus_back(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, inspected(SORTS["layers"], tmp_path), tmp_path)
    page.run("document.querySelector('td[role=gridcell]').focus()")
    page.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.END, Keys.ENTER)
    assert page.focused().text == "model.layers.2.up.weight"
    page.press(Keys.ESCAPE)
    assert page.focused().get_attribute("aria-selected") == "true"
    assert page.all(".detail .bar h3") == []
    page.press(Keys.HOME, Keys.SPACE)
    assert page.focused().text == "model.layers.2.down.weight"


def test_charts_are_read_by_keys(browser: Browser, tmp_path: Path) -> None:
    found = inspected(SORTS["layers"], tmp_path)
    page = opened(browser, found, tmp_path)
    page.run("document.querySelector('#over-training .plot').focus()")
    page.press(Keys.END)
    shown = page.text("#over-training .readout")
    assert shown.startswith("step 97: ") and "up.weight 1,122" in shown


def test_the_colour_can_show_another_measure(browser: Browser, tmp_path: Path) -> None:
    found = inspected(SORTS["layers"], tmp_path)
    page = opened(browser, found, tmp_path)
    page.all("input[type=radio]")[2].click()
    shown = [int(cell.text) for cell in page.all("td[role=gridcell]")]
    assert sum(shown) == found.entries


def test_tensors_are_found_by_name(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, inspected(layers(200, 5), tmp_path), tmp_path)
    page.all("#where-the-entries-are > details > summary")[0].click()
    page.one("input[type=search]").send_keys("199 up")
    assert page.text("p[role=status]:not(.readout)") == "1 tensor."
    page.one("#where-the-entries-are > details td button").click()
    assert page.text(".detail .bar h3") == "model.layers.199.up.weight"


def test_the_theme_follows_the_button(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, inspected(SORTS["empty"], tmp_path), tmp_path)
    colours = []
    for _ in range(3):
        page.one("#theme").click()
        colours.append(page.run("return getComputedStyle(document.body).backgroundColor"))
    light, dark, auto = colours
    assert light == auto != dark
    page.scheme("dark")
    assert page.run("return getComputedStyle(document.body).backgroundColor") == dark


def test_hostile_names_are_shown_as_text(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, inspected(SORTS["hostile"], tmp_path), tmp_path)
    page.one("#where-the-entries-are > details > summary").click()
    shown = {button.text for button in page.all("td button")}
    written = {"\u2028": r"\u{2028}", "\u202e": r"\u{202e}", "\0": r"\u{0}"}
    assert shown == {"".join(written.get(c, c) for c in name) for name in HOSTILE}
    assert page.all("main img, main script, main b") == []
