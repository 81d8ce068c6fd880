"""Every link of the Markdown files leads somewhere as GitHub shows them: files and anchors."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", ".github/**/*.md", "*/*.md", "docs/*/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
    if not {".venv", ".pytest_cache", "site", "build", "runs"} & set(path.relative_to(ROOT).parts)
    and not path.parent.is_symlink()
)
FENCE = re.compile(r"^ *(```|~~~).*?^ *\1\s*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`+[^`\n]+`+")
LINK = re.compile(r"\]\(<?([^)\s>#]*)(?:#([^)\s>]*))?>?(?: \"[^\"]*\")?\)")


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip())
    return re.sub(r"[^\w\- ]", "", text.replace("*", "").lower()).replace(" ", "-")


@cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors of a file, those of equal headings numbered."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE):
        name = slug(heading)
        names.add(f"{name}-{found[name]}" if found[name] else name)
        found[name] += 1
    return frozenset(names)


def broken(path: Path) -> list[str]:
    """What is wrong with the links of a file."""
    text = CODE.sub("", FENCE.sub("", path.read_text(encoding="utf-8")))
    wrong = []
    for link in LINK.finditer(text):
        address, anchor = unquote(link[1]), link[2]
        if re.match(r"[a-z]+:", address):
            continue
        target = path if not address else (path.parent / address)
        if not target.exists():
            wrong.append(f"{link[0]}: no such file")
        elif anchor and not anchor.startswith("deltakit.") and anchor not in anchors(target):
            wrong.append(f"{link[0]}: no such heading")
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(path: Path) -> None:
    assert broken(path) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_line_that_goes_on_looks_like_an_item(path: Path) -> None:
    """A sentence broken before "8. " is one paragraph on GitHub, and a new item on the site."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    assert re.findall(r"^ +\d+\. .*$", text, re.MULTILINE) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One: `two` (three)\n## Same\n## Same\n[a](page.md#one-two-three) [b](#same-1) [c](no.md)\n"
        "[d](#same-2) `[e](code.md)` [f](https://example.org/x)\n```\n[g](fence.md)\n# no\n```\n"
    )
    assert broken(page) == ["](no.md): no such file", "](#same-2): no such heading"]
