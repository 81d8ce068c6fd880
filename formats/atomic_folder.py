"""Writing folders so that a reader sees the whole new folder or the old one, never a half."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deltakit.errors import MissingFileError
from deltakit.formats.atomic import describing, sync, umask


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder beside `path`; on success fsync it all and move it onto `path`.

    A folder that stands at `path` is moved aside first and deleted last. On any exception,
    KeyboardInterrupt included, the temporary folder is removed and `path` is left as it was.
    Raises MissingFileError when the parent folder does not exist and OutputError when the system
    refuses to write.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise MissingFileError(f"cannot write {target}: folder {target.parent} does not exist")
    with describing(target):
        temporary = _beside(target, ".tmp")
        try:
            yield temporary
            sync_folder(temporary)
            move_folder(temporary, target)
            sync(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _beside(target: Path, suffix: str) -> Path:
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=suffix, dir=target.parent))
    made.chmod(0o777 & ~umask())  # mkdtemp makes folders private; outputs are ordinary folders
    return made


def sync_folder(path: Path) -> None:
    """fsync every file and folder in a folder, and itself."""
    for folder, _, files in os.walk(path):
        for name in files:
            sync(Path(folder, name))
        sync(Path(folder))


def move_folder(temporary: Path, target: Path) -> None:
    """Rename a folder onto `target`; what stands there is moved aside first and deleted last."""
    if not target.exists():
        temporary.rename(target)
        return
    aside = _beside(target, ".old") / target.name
    try:
        target.rename(aside)
        temporary.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        with suppress(OSError):
            aside.parent.rmdir()
        raise
    shutil.rmtree(aside.parent)
