"""Checks the built site: python docs/check_site.py site

Every link inside it must lead to a file, and to an anchor there; nothing that a page needs may come
from elsewhere; and no Markdown may be left over. Links to elsewhere are listed, and not followed.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

NEEDED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
LEFT_OVER = re.compile(r"^\s*([-|] |```|~~~)|\]\([^)]*\)|\]\[[^\]]*\]", re.MULTILINE)
FETCHED = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^\"')\s]+")


class Page(HTMLParser):
    """What a page holds: anchors, links, the files that it needs, and its text outside of code."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.anchors: set[str] = {""}
        self.links: list[str] = []
        self.needs: list[str] = []
        self.text: list[str] = []
        self._depth = {"article": 0, "code": 0, "pre": 0, "script": 0}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.anchors.update(told[key] or "" for key in ("id", "name") if key in told)
        if tag in self._depth:
            self._depth[tag] += 1
        if tag == "a" and told.get("href"):
            self.links.append(told["href"] or "")
        if tag in NEEDED and told.get(NEEDED[tag]) and told.get("rel") not in ("prev", "next"):
            self.needs.append(told[NEEDED[tag]] or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._depth:
            self._depth[tag] -= 1

    def handle_data(self, data: str) -> None:
        code = any(self._depth[tag] for tag in ("code", "pre", "script"))
        if self._depth["article"]:
            self.text.append("\u200b" if code else data)


def problems(site: Path) -> list[str]:
    """One line for everything that is wrong with the site in a folder; empty where all is well."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        found += [f"{name}: needs {n} from elsewhere" for n in page.needs if _elsewhere(n)]
        for link in (n for n in page.links + page.needs if not _elsewhere(n)):
            address, anchor = urldefrag(link)
            target = _target(site, path, address)
            if not target.is_file():
                found.append(f"{name}: {link} leads nowhere")
            elif target in pages and unquote(anchor) not in pages[target].anchors:
                found.append(f"{name}: {link} has no such anchor")
        left = LEFT_OVER.search("".join(page.text))
        if left:
            found.append(f"{name}: Markdown that was not read: {left[0].strip()!r}")
    for style in sorted(site.rglob("*.css")):
        fetched = FETCHED.findall(style.read_text(encoding="utf-8"))
        found += [f"{style.relative_to(site)}: {text} is from elsewhere" for text in fetched]
    return found


def external_links(site: Path) -> dict[str, list[str]]:
    """Address elsewhere -> the pages that link to it."""
    found: dict[str, list[str]] = {}
    for path in sorted(site.rglob("*.html")):
        for link in sorted({link for link in Page(path).links if _elsewhere(link)}):
            found.setdefault(link, []).append(path.relative_to(site).as_posix())
    return dict(sorted(found.items()))


def _elsewhere(link: str) -> bool:
    parts = urlsplit(link)
    return bool(parts.scheme or parts.netloc)


def _target(site: Path, page: Path, address: str) -> Path:
    if not address:
        return page
    start = site if address.startswith("/") else page.parent
    target = (start / unquote(urlsplit(address).path).lstrip("/")).resolve()
    return target / "index.html" if target.is_dir() else target


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    for link, names in external_links(folder).items():
        print(f"not followed: {link} ({names[0]}{', ...' if len(names) > 1 else ''})")
    wrong = problems(folder)
    print("\n".join(wrong) or f"{folder}: every link leads somewhere")
    sys.exit(bool(wrong))
