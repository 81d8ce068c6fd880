"""Pages at the end of runs: never worth the results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deltakit.pages.page import write_page
from deltakit.training.prepare import Say


def try_page(path: Path, make: Callable[[], str], say: Say) -> None:
    """Write a page to `path`; where that cannot be done, say so in one line and go on."""
    try:
        write_page(path, make())
    except Exception as error:  # noqa: BLE001 - whatever it is, the results stand without
        say(f"{path} was not written: {' '.join(str(error).split())}")
