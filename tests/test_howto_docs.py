"""Every page of docs/howto works as it stands, in the folder that Getting started leaves."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from page_lab import DOCS, blocks, commands, run_page, stands_in_source
from push_lab import log_in

# The Hub's client and peft use what their own libraries deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

PAGES = sorted(f"howto/{path.name}" for path in DOCS.glob("howto/*.md"))


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo and the run of Getting started, of small batches and few validation examples."""
    folder = tmp_path_factory.mktemp("started")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lines = [b.text for b in blocks("getting-started.md") if b.kind == "bash"]
        assert "deltakit demo" in lines[0] and "deltakit train" in lines[1]
        commands(lines[0])
        for data in Path("demo").rglob("validation.jsonl"):
            data.write_text("".join(data.read_text().splitlines(keepends=True)[:48]))
        commands(lines[1].replace("--batch-size 32", "--batch-size 4"))
    return folder


@pytest.fixture
def folder(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working directory."""
    copy = tmp_path / "page"
    shutil.copytree(started, copy)
    monkeypatch.chdir(copy)
    return copy


@pytest.mark.parametrize("page", [page for page in PAGES if page != "howto/hub.md"])
def test_the_page_runs(page: str, folder: Path) -> None:
    run_page(page)


def test_the_page_about_the_hub_runs(
    folder: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(hub, monkeypatch)
    base = folder / "demo" / "base"
    hub.add("org/base", {path.name: path.read_bytes() for path in base.iterdir()})
    run_page("howto/hub.md")
    repos: dict[Any, Any] = hub.repos
    assert {("model", "org/news"), ("model", "org/news-merged")} <= set(repos)


@pytest.mark.parametrize("page", PAGES)
def test_the_page_is_short_and_shows_what_it_runs(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    assert "**Goal: " in text and "## Choices" in text and "## What goes wrong" in text
    for message in re.findall(r"\*`([^`]+)`\*", text):
        assert stands_in_source(message), message
    kinds = {block.kind for block in blocks(page)}
    assert kinds & {"bash", "python"} and "text" in kinds
