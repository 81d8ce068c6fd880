"""Streaming safetensors files into a new one with changes, in bounded memory.

What does not change is copied by the system where it can (`copy_file_range`), so that it never
passes through this process. What is written starts on its way to the disk at once, so that the disk
works while the rest is made, and the final fsync has little left to wait for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from deltakit.errors import FormatError
from deltakit.formats import safetensors_header
from deltakit.formats.safetensors_header import BITS, Entry

if TYPE_CHECKING:
    from typing_extensions import Self

_COPY = 64 * 2**20  # bytes per system call: progress and Ctrl-C come through in between
_BUFFER = 2**20
_SOURCES = 64  # files that are read at a time; systems give few handles
_WRITEBACK = 16 * 2**20  # bytes that are sent to the disk at a time


@dataclass(frozen=True, slots=True)
class Copied:
    """Bytes that are taken from a file as they are."""

    file: Path
    offset: int
    nbytes: int


Piece = Copied | memoryview


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the new file: its dtype code, shape, size in bytes, and what makes up its
    bytes, in order."""

    name: str
    code: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterable[Piece]]


def arranged(parts: Sequence[Part]) -> list[Part]:
    """The parts with wider elements first, otherwise in the order given, as the safetensors
    library writes them: so every tensor is aligned to its element size."""
    return sorted(parts, key=lambda part: -BITS.get(part.code, 8))


def header(parts: Sequence[Part], metadata: Mapping[str, str]) -> bytes:
    """The header of a file whose body is `parts` in the order given."""
    entries, at = {}, 0
    for part in parts:
        entries[part.name] = Entry(part.code, part.shape, at, at + part.nbytes)
        at += part.nbytes
    return safetensors_header.render(entries, metadata)


def write(path: Path, head: bytes, parts: Iterable[Part], progress: Callable[[int], None]) -> None:
    """Write `head` and then the pieces of `parts` to a new file at `path`.

    progress: called with the number of bytes written since the last call. Raises FormatError when
    the pieces of a part are not as long as it says, and OSError from the system.
    """
    with ExitStack() as stack:
        target = stack.enter_context(path.open("wb", buffering=0))
        sources = stack.enter_context(_Sources())
        written = sent = 0

        def advance(size: int) -> None:
            nonlocal written, sent
            written += size
            if written - sent >= _WRITEBACK:
                _begin_writeback(target, sent, written - sent)
                sent = written
            progress(size)

        _write_all(target, memoryview(head))
        advance(len(head))
        for piece in _joined(parts):
            if isinstance(piece, memoryview):
                _write_all(target, piece)
                advance(piece.nbytes)
                continue
            _copy(sources[piece.file], target, piece, advance)


class _Sources:
    """The files that are read, of which those used last are open; a context manager."""

    def __init__(self) -> None:
        self._open: dict[Path, BinaryIO] = {}  # the one used last at the end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def __getitem__(self, path: Path) -> BinaryIO:
        file = self._open.pop(path, None) or path.open("rb", buffering=0)
        self._open[path] = file
        if len(self._open) > _SOURCES:
            self._open.pop(next(iter(self._open))).close()
        return file


def _begin_writeback(target: BinaryIO, offset: int, size: int) -> None:
    """Have the system write a range to the disk without waiting for it, where it knows how: Linux
    does when told that the range is not needed, and keeps in memory what is not written yet."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(target.fileno(), offset, size, os.POSIX_FADV_DONTNEED)


def _joined(parts: Iterable[Part]) -> Iterator[Piece]:
    """All pieces in order, neighbouring ranges of one file joined."""
    pending: Copied | None = None
    for piece in _checked(parts):
        if pending is not None:
            end = pending.offset + pending.nbytes
            if isinstance(piece, Copied) and (piece.file, piece.offset) == (pending.file, end):
                pending = Copied(pending.file, pending.offset, pending.nbytes + piece.nbytes)
                continue
            yield pending
            pending = None
        if isinstance(piece, Copied):
            pending = piece
        else:
            yield piece
    if pending is not None:
        yield pending


def _checked(parts: Iterable[Part]) -> Iterator[Piece]:
    for part in parts:
        size = 0
        for piece in part.pieces():
            size += piece.nbytes
            yield piece
        if size != part.nbytes:
            raise FormatError(
                f"tensor {part.name!r} came out with {size} bytes, expected {part.nbytes}"
            )


def _copy(
    source: BinaryIO, target: BinaryIO, piece: Copied, progress: Callable[[int], None]
) -> None:
    done = 0
    while done < piece.nbytes:
        size = min(_COPY, piece.nbytes - done)
        copied = _copy_in_system(source, target, piece.offset + done, size)
        if not copied:
            copied = _copy_through(source, target, piece.offset + done, min(size, _BUFFER))
        if not copied:
            raise FormatError(f"{piece.file} became shorter while it was read")
        done += copied
        progress(copied)


def _copy_in_system(source: BinaryIO, target: BinaryIO, offset: int, size: int) -> int:
    """Bytes copied by the system itself; 0 where it cannot (another file system, an old kernel).

    What stops the writing itself, such as a full disk, comes up again in the ordinary write.
    """
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), size, offset_src=offset)
    except OSError:
        return 0


def _copy_through(source: BinaryIO, target: BinaryIO, offset: int, size: int) -> int:
    source.seek(offset)
    data = source.read(size)
    _write_all(target, memoryview(data))
    return len(data)


def _write_all(target: BinaryIO, data: memoryview) -> None:
    rest = data.cast("B") if data.nbytes else data
    while rest.nbytes:
        rest = rest[target.write(rest) :]
