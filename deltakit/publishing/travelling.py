"""What a run tells about itself, fit to travel: no folders of its maker, no access tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from deltakit.hub.location import is_location

_PATHS = ("path", "output_dir", "init_delta", "avoid", "mask")  # values that are paths, always
_ABSOLUTE = re.compile(r"[/~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\")
_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}")  # those of people and of organisations
_HIDDEN = "***"


def fit_to_travel(value: Any, name: str = "", *, folder: Path | None = None) -> Any:
    """A JSON value with local paths cut to their last part and access tokens blotted out.

    name: the key that the value stands under. folder: of the run that recorded it. A path is what
    begins like one, what has more parts than a name on the Hub, what stands under a key for paths,
    and what exists, seen from here or from a folder that holds the run's.
    """
    if isinstance(value, Mapping):
        return {key: fit_to_travel(each, str(key), folder=folder) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [fit_to_travel(each, name, folder=folder) for each in value]
    if not isinstance(value, str):
        return value
    if _is_path(value, name) or ("/" in value and _exists(value, folder)):
        value = PureWindowsPath(value).name  # splits at both kinds of slashes
    return without_tokens(value)


def without_tokens(text: str) -> str:
    """The text with access tokens, also those within addresses, blotted out."""
    text = re.sub(r"(?<=://)[^/@\s]+@", "", text)
    return _TOKEN.sub(_HIDDEN, text)


def holds_token(text: str) -> bool:
    """Whether an access token of the Hub seems to stand in a text."""
    return _TOKEN.search(text) is not None


def _is_path(value: str, name: str) -> bool:
    if is_location(value) or "://" in value or not re.search(r"[/\\]", value) or "\n" in value:
        return False
    if name in _PATHS or _ABSOLUTE.match(value):
        return True
    return name in ("model", "data") and value.count("/") > 1


def _exists(value: str, folder: Path | None) -> bool:
    places = [Path(), *([] if folder is None else folder.resolve().parents)]
    try:
        return not is_location(value) and any((place / value).exists() for place in places)
    except (OSError, ValueError):  # too long, or no name that the system could have
        return False
