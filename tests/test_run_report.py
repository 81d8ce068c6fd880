"""RUN/report.html: everything about a run on one page, whatever became of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from train_lab import deltakit, metrics, train_flags

from deltakit.errors import DataError
from deltakit.formats.sdelta import load
from deltakit.pages.run_page import write_run_page
from deltakit.run_record import read_log
from deltakit.training.folder import RunFolder
from deltakit.training.run_report import RunReport

if TYPE_CHECKING:
    from browser_lab import Browser


def page_data(page: Path) -> dict[str, Any]:
    _, _, rest = page.read_text(encoding="utf-8").partition('id="data">')
    data: dict[str, Any] = json.loads(rest.partition("</script>")[0])
    return data


@pytest.fixture(scope="module")
def run(bert: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two marks and a swept rate."""
    folder = tmp_path_factory.mktemp("out") / "run"
    flags = train_flags(bert, colours, folder, checkpoint_budgets="100,200", unmask_fraction=0.5)
    result = deltakit("train", *flags, "--lr", "auto", "--quiet")
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def stopped(run: Path, tmp_path: Path) -> Path:
    """The folder of that run as it was before its end, while the log was being written."""
    folder = tmp_path / "stopped"
    folder.mkdir()
    for name in ("config.yaml", "run.json", "budget-100.sdelta", "lr.json"):
        (folder / name).write_bytes((run / name).read_bytes())
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    return folder


def test_the_page_tells_what_the_files_tell(run: Path) -> None:
    """Curves are those of the log, results those of metrics.json, cells those of the delta."""
    told, results = page_data(run / "report.html"), metrics(run)
    losses = [record for record in read_log(run / "log.jsonl") if "loss" in record]
    assert told["finished"] and told["step"] == told["max_steps"] == 14
    for key in ("loss", "learning_rate", "tokens_per_second", "peak_resident_bytes"):
        assert told["curves"][key]["x"] == [record["step"] for record in losses]
        logged = [record[key] for record in losses]
        assert told["curves"][key]["y"] == pytest.approx(logged, rel=1e-5)
    entries = dict(zip(*told["curves"]["entries"].values(), strict=True))
    assert entries == {record["step"]: record["entries"] for record in read_log(run / "log.jsonl")}
    ends = [*results["marks"], results["final"]]
    assert [mark["metrics"] for mark in told["marks"]] == [end["metrics"] for end in ends]
    assert [mark["file"] for mark in told["marks"]][:2] == [
        "budget-100.sdelta",
        "budget-200.sdelta",
    ]
    accuracy = dict(zip(*told["metrics"]["accuracy"].values(), strict=True))
    for end in ends:
        assert accuracy[end["step"]] == pytest.approx(end["metrics"]["accuracy"], rel=1e-5)
    assert sum(counts[-1] for counts in told["kinds"]["kinds"].values()) == 300
    grid, delta = told["delta"]["grid"], load(run / "delta.sdelta")
    cells = {
        name: entries
        for names, row in zip(grid["names"], grid["entries"], strict=True)
        for [name], entries in (
            (cell, count) for cell, count in zip(names, row, strict=True) if cell
        )
    }
    assert cells == {name: tensor.nnz for name, tensor in delta.tensors.items()}
    assert told["sweep"]["rate"] == results["lr"] == told["settings"]["lr"]


def test_made_again_it_is_the_same(run: Path, tmp_path: Path) -> None:
    """The page is a function of the folder."""
    write_run_page(run, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == (run / "report.html").read_bytes()


def test_pages_of_long_runs_stay_small(stopped: Path) -> None:
    """Twenty thousand records of the loss and two thousand evaluations: below 1 MB."""
    loss = next(record for record in read_log(stopped / "log.jsonl") if "loss" in record)
    records = [{**loss, "step": step, "loss": 1 / step} for step in range(1, 20_001)]
    records += [
        {"eval_accuracy": 0.123456789, "eval_loss": 1.5, "entries": 300, "step": 10 * step}
        for step in range(1, 2_001)
    ]
    (stopped / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_run_page(stopped, stopped / "report.html")
    assert (stopped / "report.html").stat().st_size < 1_000_000
    told = page_data(stopped / "report.html")
    assert told["curves"]["loss"]["x"][-1] == told["metrics"]["accuracy"]["x"][-1] == 20_000


def test_a_page_that_cannot_be_written_is_only_said(run: Path, stopped: Path) -> None:
    """A damaged record, and a folder in the page's place, end in a note of one line."""
    notes: list[str] = []
    reporter = RunReport(RunFolder(stopped), None, None, notes.append)  # type: ignore[arg-type]
    (stopped / "report.html").mkdir()
    reporter.write()
    (stopped / "report.html").rmdir()
    (stopped / "log.jsonl").write_text("x\n{}\n")
    reporter.write()
    assert [note.count("\n") for note in notes] == [0, 0]
    assert all("report.html was not written: " in note for note in notes)
    with pytest.raises(DataError):
        write_run_page(stopped, stopped / "report.html")
    assert not (stopped / "report.html").exists()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_of_a_finished_run(browser: Browser, run: Path, scheme: Any) -> None:
    """Every part is drawn, nothing is fetched, and axe has nothing against it, wide or narrow."""
    browser.scheme(scheme)
    browser.open(run / "report.html")
    sections = [node.text for node in browser.all("h2")]
    assert sections == [
        *("Remarks", "Training", "Budgets", "Learning rate sweep", "Where the entries went"),
        *("What it cost", "Settings", "Base", "Data", "Environment"),
    ]
    assert "300" in browser.text("dl.cards")
    titles = {node.text for node in browser.all("h3")}
    assert titles >= {"Loss", "Learning rate", "Budget against metric", "By block and kind"}
    assert titles >= {"Entries by kind over the steps", "Memory", "Throughput"}
    assert browser.requests() == []
    for width in (1280, 360):
        browser.resize(width, 800)
        assert browser.too_wide() == []
        assert browser.violations() == []


def test_page_of_an_unfinished_run(browser: Browser, stopped: Path) -> None:
    """What there is so far, and that it is not all; also without a delta or a record."""
    write_run_page(stopped, stopped / "report.html")
    browser.open(stopped / "report.html")
    assert "not finished when this page was written" in browser.text("main")
    assert "budget-100.sdelta" in browser.text("#where-the-entries-went")
    assert browser.violations() == []
    for name in ("budget-100.sdelta", "log.jsonl", "run.json", "lr.json"):
        (stopped / name).unlink()
    write_run_page(stopped, stopped / "report.html")
    browser.open(stopped / "report.html")
    assert [node.text for node in browser.all("h2")] == ["Settings"]
