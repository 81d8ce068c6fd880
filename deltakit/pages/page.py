"""One self-contained HTML document: the data as JSON, and the style and script that draw it."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from html import escape
from math import isfinite
from pathlib import Path
from string import Template
from typing import Any

import deltakit
from deltakit.formats.atomic import write_bytes

_ASSETS = Path(__file__).with_name("assets")
# What all pages share, in the order in which it stands in the one script of each.
_SCRIPTS = ("format.js", "base.js", "axes.js", "lines.js", "bars.js", "heatmap.js", "joint.js")
# JSON stands inside an element whose end, or whose comment, a name in a file could fake.
_MARKUP = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}


def page(title: str, data: Mapping[str, Any], *scripts: str) -> str:
    """The document that shows `data`, as text.

    title: of the window and the first heading. data: JSON values, arrays of NumPy and paths; NaN and
    infinities become null. scripts: names of the assets that draw it, such as "delta.js". Nothing
    is loaded from anywhere, and the document's own policy (CSP level 3, by hashes) lets no script
    or style run but these.
    """
    style = _asset("page.css")
    code = "".join(_asset(name) for name in (*_SCRIPTS, *scripts))
    text = json.dumps(_plain(data), separators=(",", ":"), allow_nan=False)
    return Template(_asset("page.html")).substitute(
        title=escape(_printable(title)),
        version=escape(deltakit.__version__),
        style=style,
        style_hash=_hash(style),
        data=text.translate(_MARKUP),
        code=code,
        code_hash=_hash(code),
    )


def write_page(path: Path, html: str) -> None:
    """Write the document to `path`, whole or not at all. Errors as for every output."""
    write_bytes(path, html.encode())


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return b64encode(sha256(text.encode()).digest()).decode()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # an array or a scalar of NumPy
        return _plain(value.tolist())
    return str(value) if isinstance(value, Path) else value


def _printable(text: str) -> str:
    """Controls and marks of direction written out, so that a title reads as it is stored."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
