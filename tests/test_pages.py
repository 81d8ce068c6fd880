"""A page is one file that loads nothing, and nothing in its data can leave the data."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_lab import Browser

from deltakit.errors import MissingFileError
from deltakit.pages import page as pages
from deltakit.pages.page import page, write_page

ASSETS = sorted(Path(pages.__file__).with_name("assets").iterdir())
HOSTILE = [
    "</script><script>throw new Error('out')</script>",
    "<!-- <script>",
    "]]> --> </title></style></main>",
    "lines\u2028and\u2029paragraphs",
    "\u202egnirts \u2066\u200f",
    "nul\0 bell\a",
    "quotes \" ' ` & &lt; ${data} $data \\u003c",
    "\ud800 alone",
]


class Parts(HTMLParser):
    """The elements of a document in order: (tag, attributes, text directly inside)."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self.inside = False
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), ""))
        self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            tag, attributes, text = self.found[-1]
            self.found[-1] = (tag, attributes, text + data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, text) for name, attributes, text in self.found if name == tag]


def data_of(document: str) -> Any:
    [text] = [
        t for attributes, t in Parts(document).all("script") if attributes.get("id") == "data"
    ]
    return json.loads(text)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_come_back_as_they_were(name: str) -> None:
    document = page(name, {name: [name]}, "delta.js")
    parts = Parts(document)
    assert data_of(document) == {name: [name]}
    plain = Parts(page("plain", {}, "delta.js"))
    assert [tag for tag, _, _ in parts.found] == [tag for tag, _, _ in plain.found]
    (_, title), (_, heading) = *parts.all("title"), *parts.all("h1")
    assert title.strip() == heading.strip() and title.strip().isprintable()
    [data] = re.findall(r'id="data">(.*?)</script>', document, re.DOTALL)
    assert data.isascii() and not set("<>&") & set(data)


def test_numbers_that_json_lacks_become_null() -> None:
    told = {"a": np.array([1.5, np.nan]), "b": (float("inf"), np.int64(3)), "c": Path("x") / "y"}
    assert data_of(page("t", told, "delta.js")) == {
        "a": [1.5, None],
        "b": [None, 3],
        "c": str(Path("x") / "y"),
    }


def test_the_policy_allows_this_style_and_this_script_and_nothing_else() -> None:
    parts = Parts(page("t", {}, "delta.js"))
    [policy] = [a["content"] for a, _ in parts.all("meta") if "http-equiv" in a]
    [(_, style)] = parts.all("style")
    [script] = [text for attributes, text in parts.all("script") if not attributes]
    hashes = {
        name: b64encode(sha256(text.encode()).digest()).decode()
        for name, text in (("style-src", style), ("script-src", script))
    }
    assert dict(rule.strip().split(" ", 1) for rule in str(policy).split(";")) == {
        "default-src": "'none'",
        **{name: f"'sha256-{code}'" for name, code in hashes.items()},
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


@pytest.mark.parametrize("asset", ASSETS, ids=lambda path: path.name)
def test_assets_load_nothing_and_take_no_text_for_markup(asset: Path) -> None:
    text = asset.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    for word in ("http:", "https:", "url(", "@import", "import(", "fetch(", "XMLHttp", "src="):
        assert word not in text, word
    if asset.suffix != ".html":
        for word in ("</script", "</style", "<!--", "innerHTML", "outerHTML", "insertAdjacent"):
            assert word not in text, word
        assert not re.search(r"\beval\b|new Function|document\.write", text)


def test_writing_needs_a_folder_and_leaves_nothing_half(tmp_path: Path) -> None:
    write_page(tmp_path / "a.html", "\u00e9")
    assert (tmp_path / "a.html").read_bytes() == "\u00e9".encode()
    with pytest.raises(MissingFileError, match="folder"):
        write_page(tmp_path / "none" / "a.html", "")


def test_marks_of_direction_are_written_out(browser: Browser, tmp_path: Path) -> None:
    """Text of strangers is shown letter by letter, so that no name looks like another."""
    write_page(tmp_path / "a.html", page("t", {}))
    browser.open(tmp_path / "a.html")
    shown = [browser.run("return visible(arguments[0])", name) for name in HOSTILE[:-1]]
    assert all(text.isprintable() for text in shown)
    assert shown[4] == r"\u{202e}gnirts \u{2066}\u{200f}"
