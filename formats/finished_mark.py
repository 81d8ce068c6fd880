"""A small hidden file beside an output that several jobs made: which work it came from.

A job that is run again once all is done learns from it that nothing is left to do, although the
output tells nothing about that itself. A mark speaks of the very files that were published: it is
void once one of them is replaced or changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from deltakit.formats.atomic import write_bytes

_SUFFIX = ".done"


def write_mark(target: Path, key: str, made: Path, names: Iterable[str]) -> None:
    """Say that the work `key` made `target`, which still stands at `made`.

    names: of the files in it that tell it apart; "" is `target` itself. Marks of other work on
    `target` are removed.
    """
    clear_marks(target)
    found = {name: _state(made / name if name else made) for name in names}
    write_bytes(_mark(target, key), json.dumps(found).encode())


def is_marked(target: Path, key: str) -> bool:
    """Whether `target` is what the work `key` made."""
    try:
        found = json.loads(_mark(target, key).read_bytes())
        states = {name: _state(target / name if name else target) for name in found}
        return bool(states) and states == found
    except (OSError, ValueError, TypeError):
        return False


def clear_marks(target: Path) -> None:
    """Remove the marks on `target`."""
    for path in target.parent.iterdir():
        if path.name.startswith(f".{target.name}.") and path.suffix == _SUFFIX:
            path.unlink(missing_ok=True)


def _mark(target: Path, key: str) -> Path:
    return target.with_name(f".{target.name}.{key}{_SUFFIX}")


def _state(path: Path) -> list[int]:
    """Size in bytes and time of change, which moving a file does not change."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
