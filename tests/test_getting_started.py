"""docs/getting-started.md and docs/concepts.md work as they stand, and what they show holds."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from importlib.metadata import metadata
from pathlib import Path

import pytest
from page_lab import DOCS, run_page
from safetensors.numpy import load_file

PAGES = ["getting-started.md", *(f"howto/{p.name}" for p in sorted(DOCS.glob("howto/*.md")))]


def own_model(folder: Path) -> None:
    """What the page calls `my-model` and `my-texts.jsonl`."""
    from deltakit.demo import write_files

    write_files(folder / "theirs")
    shutil.move(folder / "theirs" / "base", folder / "my-model")
    lines = (folder / "theirs" / "tasks" / "kind" / "train.jsonl").read_text().splitlines()
    (folder / "my-texts.jsonl").write_text("\n".join(lines[:200]))


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    run_page("getting-started.md")
    assert Path("live.jsonl").read_bytes() == Path("merged.jsonl").read_bytes()
    record = json.loads(Path("run/metrics.json").read_text())
    assert record["final"]["metrics"]["accuracy"] > 0.5  # "two thirds are right"
    mine, base = load_file("my-merged/model.safetensors"), load_file("my-model/model.safetensors")
    weights = sum(tensor.size for tensor in base.values())
    changed = sum(int((mine[name] != base[name]).sum()) for name in base)
    assert 0 < changed <= weights // 200


def test_the_concepts_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page("concepts.md")


def test_figures_are_those_of_the_script(tmp_path: Path) -> None:
    """Small, of both themes, and with the words that the script writes today where it can tell."""
    shown = re.findall(
        r"!\[[^\]]{30,}\]\((.*?)\)", (DOCS / "concepts.md").read_text(encoding="utf-8")
    )
    drawn = runpy.run_path(str(DOCS / "figures" / "make.py"))["exact"](tmp_path)
    assert {Path(figure).name for figure in shown} > {path.name for path in drawn}
    for figure in shown:
        text = (DOCS / figure).read_text(encoding="utf-8")
        assert len(text) < 60_000
        assert "prefers-color-scheme: dark" in text
        again = tmp_path / Path(figure).name
        if again.exists():
            words = re.compile(r"<text[^>]*>([^<]*)<")
            assert words.findall(text) == words.findall(again.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_what_is_installed_exists(page: str) -> None:
    offered = metadata("deltakit-sparse").get_all("Provides-Extra") or []
    text = (DOCS / page).read_text(encoding="utf-8")
    for extras in re.findall(r"pip install '\.\[(.*?)\]'", text):
        assert set(extras.split(",")) <= set(offered)
    makefile = (DOCS.parent / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
