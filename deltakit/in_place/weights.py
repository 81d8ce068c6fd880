"""The weight files of a checkpoint, open for changing single entries where they stand."""

from __future__ import annotations

import os
from contextlib import ExitStack
from itertools import pairwise
from mmap import PAGESIZE
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import JournalError, MissingFileError, OutputError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.checkpoint_files import locate
from deltakit.formats.locks import try_lock
from deltakit.hub.locate import refuse_location

if TYPE_CHECKING:
    from typing_extensions import Self

_SPAN = 2**20  # bytes that are read and written by one call
_CHUNK = 2**16  # entries whose places are found at a time
_MANY = 4  # runs that cost as much as a span that is read first


class OpenWeights:
    """A checkpoint whose files are open for writing and locked; a context manager.

    `checkpoint` reads it. The lock keeps other deltakit processes out until this one ends, however
    it ends (no lock on Windows). Raises MissingFileError and FormatError as Checkpoint does,
    OutputError for files that must not be written, JournalError for files that are locked.
    """

    def __init__(self, model: str | Path) -> None:
        refuse_location(model)
        with ExitStack() as stack:
            self._files: dict[Path, BinaryIO] = {}
            for path in _changeable(model):
                self._files[path] = stack.enter_context(_opened(path))
                _lock(self._files[path], path)
            self._seen = self._stats()
            self.checkpoint = Checkpoint(model, unfinished=True)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def refuse_links(self) -> None:
        """Raise OutputError for a file that is a symbolic link or has hard links."""
        for path, file in self._files.items():
            links = os.fstat(file.fileno()).st_nlink
            if path.is_symlink():
                what = f"a symbolic link to {path.readlink()}"
            elif links > 1:
                what = f"one of {links} hard links to the same bytes"
            else:
                continue
            raise OutputError(
                f"{path} is {what}, so others may read these weights too (as from the cache of the "
                "Hub); merge into a new file, or --force changes them for all"
            )

    def refuse_changes(self) -> None:
        """Raise JournalError when anybody has written or replaced a file since it was opened."""
        for path, seen in self._stats().items():
            if seen != self._seen[path]:
                raise JournalError(
                    f"{path} was changed by something else in the meantime; nothing was written"
                )

    def write(self, name: str, indices: Array, words: Array) -> None:
        """Give the entries of a tensor at sorted flat `indices`, int64 [n], the raw `words` [n].

        No other byte changes, and only pages that hold entries are written. Raises OutputError
        where the system refuses.
        """
        info = self.checkpoint.info(name)
        file = self._files[info.file]
        itemsize = info.kind.itemsize
        try:
            for at in range(0, len(indices), _CHUNK):
                part = slice(at, at + _CHUNK)
                starts = info.offset + indices[part] * itemsize
                _patch(file, starts, words[part])
        except OSError as error:
            raise OutputError(f"cannot write {info.file}: {error.strerror or error}") from error

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        for path, file in self._files.items():
            try:
                os.fsync(file.fileno())
            except OSError as error:
                raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        self._seen = self._stats()

    def _stats(self) -> dict[Path, tuple[int, ...]]:
        found = {path: path.stat() for path in self._files}
        return {p: (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for p, s in found.items()}


def _changeable(model: str | Path) -> tuple[Path, ...]:
    located = locate(model)
    if located.is_dcp:
        raise OutputError(
            f"{model} is a directory of torch.distributed.checkpoint, which is not changed in place; "
            "merge into a new folder"
        )
    return located.files


def _opened(path: Path) -> BinaryIO:
    if not path.exists():
        raise MissingFileError(f"{path} does not exist")
    try:
        return path.open("r+b", buffering=0)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; nothing was changed"
        ) from error


def _lock(file: BinaryIO, path: Path) -> None:
    if try_lock(file.fileno()) is False:
        raise JournalError(
            f"another process is merging into {path} or taking a merge back; wait until it has done"
        )


def _patch(file: BinaryIO, starts: Array, words: Array) -> None:
    """Write `words` [n] at the bytes `starts` [n], sorted.

    Runs of neighbouring entries are written one by one or, where pages hold many of them, whole
    spans of pages are read, changed and written.
    """
    itemsize = words.itemsize
    runs = _cut(np.diff(starts) != itemsize)
    spans = _cut((np.diff(starts // PAGESIZE) > 1) | (np.diff(starts // _SPAN) > 0))
    if len(runs) <= _MANY * len(spans):
        data = memoryview(words.tobytes())
        for at, first, last in zip(starts[runs[:-1]].tolist(), runs, runs[1:], strict=False):
            _write(file, at, data[first * itemsize : last * itemsize])
        return
    for first, last in pairwise(spans):
        at = int(starts[first])
        span = np.frombuffer(_read(file, at, int(starts[last - 1]) + itemsize - at), np.uint8)
        places = (starts[first:last] - at)[:, None] + np.arange(itemsize)
        span[places] = words[first:last].view(np.uint8).reshape(-1, itemsize)
        _write(file, at, span.data)


def _cut(here: Array) -> list[int]:
    """The bounds of n + 1 entries that are cut between i and i + 1 wherever `here` [n] says so."""
    return [0, *(np.flatnonzero(here) + 1).tolist(), len(here) + 1]


def _read(file: BinaryIO, at: int, size: int) -> bytearray:
    file.seek(at)
    data = bytearray()
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            raise OSError(f"it became shorter: {size - len(data)} bytes are missing")
        data += more
    return data


def _write(file: BinaryIO, at: int, rest: memoryview) -> None:
    file.seek(at)
    while rest.nbytes:
        rest = rest[file.write(rest) :]
