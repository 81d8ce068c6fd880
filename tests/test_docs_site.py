"""The documentation site builds strictly, its links lead somewhere, and it needs nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
from browser_lab import Browser

import deltakit

ROOT = Path(__file__).parents[1]
API = sorted((ROOT / "docs" / "api").glob("*.md"))


def load(name: str) -> ModuleType:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_site = load("check_site")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, in another folder."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_link_leads_somewhere_and_nothing_is_fetched(site: Path) -> None:
    assert check_site.problems(site) == []


def test_pages_from_outside_docs_are_there(site: Path) -> None:
    for page, heading in [
        ("spec.html", "5. Index codings"),
        ("benchmarks.html", "Step cost"),
        ("contributing.html", "Adding things"),
        ("changelog.html", "Unreleased"),
        ("source/formats/coding.py.html", "formats/coding.py"),
    ]:
        assert heading in (site / page).read_text(encoding="utf-8"), page


def test_the_search_knows_every_page_but_those_of_sources(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    pages = {p.relative_to(site).as_posix() for p in site.rglob("*.html")} - {"404.html"}
    assert found == {page for page in pages if not page.startswith("source/")}
    assert any("Golomb" in entry["text"] for entry in index["docs"])


def test_every_public_name_is_told_once_and_has_a_place(site: Path) -> None:
    told = [
        name
        for page in API
        for name in re.findall(r"^::: deltakit\.(\w+)$", page.read_text(), re.MULTILINE)
        if name != "errors"
    ]
    assert sorted(told) == sorted(deltakit._EXPORTS)
    built = "".join(p.read_text(encoding="utf-8") for p in (site / "api").glob("*.html"))
    for name in deltakit._EXPORTS:
        assert built.count(f'id="deltakit.{name}"') == 1, name


def test_every_public_name_has_a_docstring() -> None:
    griffe = pytest.importorskip("griffe")
    package = griffe.load("deltakit", search_paths=[ROOT], allow_inspection=False)
    for name in deltakit._EXPORTS:
        item = package[name].final_target
        assert item.has_docstring, name
        if item.is_class:
            methods = [m for m in item.members.values() if m.is_function and m.name[0] != "_"]
            assert [m.name for m in methods if not m.has_docstring] == [], name


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="no.html">x</a>', "index.html: no.html leads nowhere"),
        ('<a href="other.html#no">x</a>', "index.html: other.html#no has no such anchor"),
        ('<a href="#no">x</a>', "index.html: #no has no such anchor"),
        (
            '<script src="https://cdn.example/x.js"></script>',
            "index.html: needs https://cdn.example/x.js from elsewhere",
        ),
        (
            '<img src="//cdn.example/x.png">',
            "index.html: needs //cdn.example/x.png from elsewhere",
        ),
        ("<article><p>So\n- it was</p></article>", "index.html: Markdown that was not read: '-'"),
        ("<article>[a](b.md)</article>", "index.html: Markdown that was not read: '](b.md)'"),
    ],
)
def test_what_is_wrong_with_a_site_is_told(body: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(body)
    (tmp_path / "other.html").write_text(
        '<a href="index.html">a</a><a href="#b">b</a><a id="b" href="https://example.org">c</a>'
        "<article><code>[a](b)</code><pre>\n- a\n</pre></article>"
    )
    (tmp_path / "style.css").write_text("p { background: url(data:image/png;base64,AA) }")
    assert check_site.problems(tmp_path) == [problem]
    assert check_site.external_links(tmp_path) == {"https://example.org": ["other.html"]}


def test_links_are_rewritten_from_the_repository_to_the_site() -> None:
    hooks = load("hooks")
    page = "A [spec](../formats/SPEC.md#9-versions), [code](../cli/main.py), [tie](live.md#a)\n"
    assert hooks.rewritten("hub.md", page + "```\n[x](../README.md)\n```\nText\n- item\n") == (
        "A [spec](spec.md#9-versions), [code](source/cli/main.py.md), [tie](live.md#a)\n"
        "```\n[x](../README.md)\n```\nText\n\n- item\n"
    )
    assert hooks.rewritten("howto/merge.md", "[a](../../CHANGELOG.md) [b](../hub.md)") == (
        "[a](../changelog.md) [b](../hub.md)"
    )
    assert hooks.rewritten("spec.md", "[a](../docs/hub.md) [b](https://x.y/z.md)") == (
        "[a](hub.md) [b](https://x.y/z.md)"
    )
    assert hooks.linked_files("hub.md", page) == ["cli/main.py"]
    assert hooks.rewritten("hub.md", "[a](../../secret) [b](no.md)") == (
        "[a](../../secret) [b](no.md)"
    )


def test_parameters_become_lists_and_public_names_links() -> None:
    markdown = load("docstrings").markdown
    text = (
        "What it does. See `save`.\n\n"
        "one, two: of [n], see\n`dk.load`. three: other: `x`. Raises DataError, and OSError."
    )
    links = {name: f"deltakit.{name}" for name in ("load", "save", "DataError")}
    assert markdown(text, {"one", "two", "three"}, links) == (
        "What it does. See [`save`][deltakit.save].\n\n"
        "- `one`, `two`: of [n], see [`dk.load`][deltakit.load].\n"
        "- `three`: other: `x`.\n\n"
        "Raises [DataError][deltakit.DataError], and OSError."
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", ["index.html", "cli.html", "api/deltas.html", "methods.html"])
def test_pages_open_from_disk_for_everybody_and_ask_for_nothing_else(
    page: str, scheme: Literal["light", "dark"], site: Path, browser: Browser
) -> None:
    browser.scheme(scheme)
    browser.open(site / page)
    assert {url.partition(":")[0] for url in browser.requests()} <= {"file", "data"}
    assert browser.errors() == [] and browser.too_wide() == []
    assert browser.violations() == []
    browser.errors()  # axe asks for the style sheets, which pages on disk may not read


def test_the_search_finds_what_is_typed_without_a_server(site: Path, browser: Browser) -> None:
    browser.open(site / "index.html")
    browser.driver.find_element("css selector", ".md-search__input").send_keys("golomb")
    browser.driver.execute_async_script(
        """
        const [page, done] = arguments;
        const look = () => {
          const links = [...document.querySelectorAll(".md-search-result__link")];
          if (links.some(link => link.href.includes(page))) done();
          else setTimeout(look, 50);  // the driver gives up at last
        };
        look();
        """,
        "/benchmarks.html",
    )
