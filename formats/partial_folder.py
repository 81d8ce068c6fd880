"""Folders written file by file, so that after a crash the same work goes on where it stopped."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltakit.errors import ChecksumError, HubError, MissingFileError, OutputError
from deltakit.formats.atomic import describing, remove_temporaries, sync
from deltakit.formats.atomic_folder import move_folder, sync_folder
from deltakit.formats.finished_mark import clear_marks
from deltakit.formats.locks import try_lock

_DOWNLOADS = (HubError, ChecksumError)  # errors that the same command may not meet again


@contextmanager
def resuming_folder(path: str | os.PathLike[str], key: str) -> Iterator[Path]:
    """Give the partial folder of the work `key` on `path`; on success move it onto `path`.

    key: names the work and everything that it depends on, so that equal keys mean equal bytes. A
    process that was killed leaves its partial folder, hidden beside `path`: with the same key its
    files, written through `placing`, are kept, of any other key it is removed. On any exception,
    KeyboardInterrupt included, what this process began is removed at once and `path` is left as it
    was; a folder that was there before stays, and so does one where a download failed. Raises
    MissingFileError when the parent folder does not exist, and OutputError when the system refuses
    to write or while another process works on `path`.
    """
    target = real_target(path)
    partial = partial_folder(target, key)
    with describing(target):
        for left in partial_folders(target):
            with _locked(left, target):
                if left != partial:
                    shutil.rmtree(left, ignore_errors=True)
        began = not partial.exists()
        partial.mkdir(exist_ok=True)
        with _locked(partial, target):
            try:
                yield partial
                publish(partial, target)
            except BaseException as error:
                if began and not isinstance(error, _DOWNLOADS):
                    shutil.rmtree(partial, ignore_errors=True)
                elif partial.exists():
                    remove_temporaries(partial)
                raise
        clear_marks(target)


def publish(partial: Path, target: Path) -> None:
    """Make a partial folder durable, and move it onto `target`."""
    remove_temporaries(partial)
    sync_folder(partial)
    move_folder(partial, target)
    sync(target.parent)


def real_target(path: str | os.PathLike[str]) -> Path:
    """Where a folder is to be written, links followed; MissingFileError where its parent is not."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise MissingFileError(f"cannot write {target}: folder {target.parent} does not exist")
    return target


def partial_folder(target: Path, key: str) -> Path:
    """The partial folder of the work `key` on `target`."""
    return target.with_name(f".{target.name}.{key}.partial")


def partial_folders(target: Path) -> list[Path]:
    """The partial folders of any work on `target`."""
    return [
        path
        for path in target.parent.iterdir()
        if path.name.startswith(f".{target.name}.") and path.suffix == ".partial"
    ]


def is_whole(path: Path, size: int) -> bool:
    """Whether a file that was written by `placing` is there, of this size in bytes."""
    return path.is_file() and path.stat().st_size == size


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
