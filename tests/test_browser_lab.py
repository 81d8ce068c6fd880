"""The browser of the tests sees what pages do wrong; one that sees nothing would pass them all."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser_lab import Browser

_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>t</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
script-src 'unsafe-inline'"><style>body {{color: #111; background: #fff}}
@media (prefers-color-scheme: dark) {{body {{color: #eee; background: #111}}}}</style></head>
<body><main><h1>t</h1>{0}</main></body></html>"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "page.html"


def write(page: Path, body: str) -> Path:
    page.write_text(_PAGE.format(body))
    return page


def test_a_good_page_passes(browser: Browser, page: Path) -> None:
    waited = browser.open(write(page, "<p>Nothing wrong.</p>"))
    assert 0 < waited < 30_000
    assert browser.violations() == []
    assert browser.requests() == browser.too_wide() == []


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("<script>throw new Error('broken')</script>", "broken"),
        ("<script>console.error('told')</script>", "told"),
        ('<img alt="a" src="https://example.invalid/a.png">', "Content Security Policy"),
    ],
)
def test_errors_of_the_console_are_seen_once(
    browser: Browser, page: Path, body: str, told: str
) -> None:
    browser.open(write(page, body))
    errors = browser.errors()
    assert errors and all(told in error for error in errors)
    assert browser.errors() == []


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        ('<button aria-label=""></button>', "button-name"),
        ('<p style="color: #bbb">faint</p>', "color-contrast"),
    ],
)
def test_violations_are_seen(browser: Browser, page: Path, body: str, rule: str) -> None:
    browser.open(write(page, body))
    assert [found.partition(" ")[0] for found in browser.violations()] == [rule]


def test_sizes_schemes_and_what_is_too_wide(browser: Browser, page: Path) -> None:
    browser.open(write(page, '<p id="wide" style="width: 500px">wide</p>'))
    assert browser.too_wide() == []
    browser.resize(360, 640)
    assert browser.run("return innerWidth") == 360
    assert any("wide" in part for part in browser.too_wide())
    ground = "return getComputedStyle(document.body).backgroundColor"
    assert browser.run(ground) == "rgb(255, 255, 255)"
    browser.scheme("dark")
    assert browser.run(ground) == "rgb(17, 17, 17)"
    shot = page.with_suffix(".png")
    browser.screenshot(shot)
    assert shot.read_bytes().startswith(b"\x89PNG")


def test_loaded_files_are_seen(browser: Browser, page: Path) -> None:
    other = page.with_name("a.js")
    other.write_text("")
    page.write_text('<!doctype html><html lang="en"><script src="a.js"></script></html>')
    browser.open(page)
    assert browser.requests() == [other.as_uri()]
