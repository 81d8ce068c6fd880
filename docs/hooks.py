"""Pages of the site that live elsewhere in the repository, and links to files that are no pages.

Every page is written for GitHub: its links are relative to where its file lies. On the site a link
to a page that was brought in from elsewhere leads to that page, and a link to any other file of the
repository leads to a page that shows it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {  # file of the repository -> page of the site
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
    "formats/SPEC.md": "spec.md",
}
PLACES = {page: place for place, page in OUTSIDE.items() if page != "index.md"}
LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml"}
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
TIGHT = re.compile(r"^(?![ \-*|>#]|\d+\. |$)(.+)\n(?=[-*] |\d+\. |\|)", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Enter the pages that lie outside docs/, and a page for every file that pages link to."""
    for page, place in PLACES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / place)))
    for file in list(files.documentation_pages()):
        for target in linked_files(file.src_uri, file.content_string):
            if files.get_file_from_path(source_page(target)) is None:
                text = shown(ROOT / target, target)
                files.append(File.generated(config, source_page(target), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links as the site has them."""
    return rewritten(page.file.src_uri, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page without heads of tables that name nothing, which Markdown cannot leave out."""
    return html.replace("<th></th>", "<td></td>")


def place_of(page: str) -> str:
    """Where the file of a page lies in the repository."""
    return PLACES.get(page, f"docs/{page}")


def source_page(place: str) -> str:
    """The page that shows a file of the repository which is no page itself."""
    return f"source/{place}.md"


def page_of(place: str) -> str:
    """The page of the site that a file of the repository is found on."""
    if place in OUTSIDE:
        return OUTSIDE[place]
    inside = place.removeprefix("docs/")
    is_page = inside != place and not place.endswith(".py")
    return inside if is_page else source_page(place)


def linked_files(page: str, markdown: str) -> list[str]:
    """The files of the repository that a page links to and that are no pages themselves."""
    places = (_place(page, link) for link, _ in _links(markdown))
    return [p for p in places if p is not None and page_of(p) == source_page(p)]


def rewritten(page: str, markdown: str) -> str:
    """Links relative to the file's place in the repository become relative to the page."""

    def replace(link: re.Match[str]) -> str:
        place = _place(page, link[1])
        if place is None:
            return link[0]
        return posixpath.relpath(page_of(place), posixpath.dirname(page)) + (link[2] or "")

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [spaced(LINK.sub(replace, markdown[end : fence.start()])), fence[0]]
        end = fence.end()
    return "".join([*parts, spaced(LINK.sub(replace, markdown[end:]))])


def spaced(markdown: str) -> str:
    """An empty line before lists and tables that follow a paragraph, which GitHub can do without."""
    return TIGHT.sub(r"\1\n\n", markdown)


def shown(path: Path, place: str) -> str:
    """A page with the text of one file, left out of the search."""
    language = LANGUAGES.get(path.suffix, "text")
    text = path.read_text(encoding="utf-8").rstrip()
    return f"---\nsearch: {{exclude: true}}\n---\n# {place}\n\n~~~~{language}\n{text}\n~~~~\n"


def _links(markdown: str) -> list[tuple[str, str]]:
    return [(link[1], link[2] or "") for link in LINK.finditer(FENCE.sub("", markdown))]


def _place(page: str, link: str) -> str | None:
    """The file of the repository that a link leads to; None for what is not a file of it."""
    if ":" in link or page.startswith("source/"):
        return None
    place = posixpath.normpath(posixpath.join(posixpath.dirname(place_of(page)), link))
    return place if not place.startswith("..") and (ROOT / place).is_file() else None
