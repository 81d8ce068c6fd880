"""Folders written file by file, so that after a crash the same work goes on where it stopped."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltakit.errors import MissingFileError, OutputError
from deltakit.formats.atomic import describing, sync
from deltakit.formats.atomic_folder import move_folder, sync_folder
from deltakit.formats.locks import try_lock


@contextmanager
def resuming_folder(path: str | os.PathLike[str], key: str) -> Iterator[Path]:
    """Give the partial folder of the work `key` on `path`; on success move it onto `path`.

    key: names the work and everything that it depends on, so that equal keys mean equal bytes. A
    process that was killed leaves its partial folder, hidden beside `path`: with the same key its
    finished files (`finishing`) are kept, of any other key it is removed. On any exception,
    KeyboardInterrupt included, it is removed at once and `path` is left as it was. Raises
    MissingFileError when the parent folder does not exist, and OutputError when the system refuses
    to write or while another process works on `path`.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise MissingFileError(f"cannot write {target}: folder {target.parent} does not exist")
    partial = target.with_name(f".{target.name}.{key}.partial")
    with describing(target):
        for left in _left(target):
            with _locked(left, target):
                if left != partial:
                    shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        with _locked(partial, target):
            try:
                yield partial
                sync_folder(partial)
                move_folder(partial, target)
                sync(target.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise


@contextmanager
def finishing(path: Path) -> Iterator[Path]:
    """Give another name to write to; then fsync and rename, so that a file of this name is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    sync(temporary)
    temporary.replace(path)


def is_whole(path: Path, size: int) -> bool:
    """Whether a file that was written by `finishing` is there, of this size in bytes."""
    return path.is_file() and path.stat().st_size == size


def _left(target: Path) -> list[Path]:
    return [
        path
        for path in target.parent.iterdir()
        if path.name.startswith(f".{target.name}.") and path.suffix == ".partial"
    ]


@contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    """Hold the lock of a partial folder, which the system lets go of when a process dies."""
    if sys.platform == "win32":  # folders cannot be opened there
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        if try_lock(handle) is False:
            raise OutputError(f"another process is writing {target}; wait for it, or stop it")
        yield
    finally:
        os.close(handle)
