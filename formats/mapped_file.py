"""A file mapped read-only, of which single elements are taken without keeping pages mapped."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import FormatError

_GATHER_CHUNK = 256  # entries
GATHER_MAPPED = _GATHER_CHUNK * 2**16  # bytes: a fault maps up to 64 kB around an entry
_SCATTERED = 2**15  # bytes per entry from which on entries are read one by one
_OPEN = 64  # files of a folder that are mapped at a time; each keeps a handle, and systems give few


class MappedFile:
    """A file that is mapped when first needed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def array(
        self,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        strides: tuple[int, ...] | None = None,
    ) -> Array:
        """A read-only view of `shape`; offset and strides in bytes, row-major without strides."""
        return np.ndarray(shape, dtype, self.map, offset, strides)

    def gather(self, offset: int, size: int, dtype: np.dtype[Any], indices: Array) -> Array:
        """The elements at `indices` (int64 [n], any order, all from 0 to size - 1) of an array of
        `size` elements that starts at byte `offset`, [n]."""
        if len(indices) * _SCATTERED < size * dtype.itemsize:
            return self._read_each(offset, dtype, indices)
        array = self.array(offset, (size,), dtype)
        out = np.empty(len(indices), dtype)
        for at in range(0, len(indices), _GATHER_CHUNK):
            part = indices[at : at + _GATHER_CHUNK]
            low, high = int(part.min()), int(part.max())
            out[at : at + _GATHER_CHUNK] = array[part]
            self.release(offset + low * dtype.itemsize, (high - low + 1) * dtype.itemsize)
        self.release(offset, size * dtype.itemsize)  # what faults have mapped around entries
        return out

    def read_into(self, offset: int, target: Array) -> None:
        """Fill a row-major array by plain reads, which map nothing; FormatError where the file has
        become too short for it."""
        rest = target.reshape(-1).view(np.uint8).data
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            while rest.nbytes:
                count = file.readinto(rest)
                if not count:
                    raise FormatError(f"{self.path} became shorter while it was read")
                rest = rest[count:]

    def _read_each(self, offset: int, dtype: np.dtype[Any], indices: Array) -> Array:
        """`gather` for entries so far apart that mapping, let alone reading ahead, costs more than
        a call for each."""
        found = []
        with self.path.open("rb", buffering=0) as file:
            for place in (offset + indices * dtype.itemsize).tolist():
                file.seek(place)
                found.append(file.read(dtype.itemsize))
        return np.frombuffer(bytearray().join(found), dtype)

    def release(self, offset: int, size: int) -> None:
        """Hand mapped pages back; the system's file cache keeps them, and a later use maps them
        again."""
        if size and hasattr(mmap, "MADV_DONTNEED"):
            start = offset - offset % mmap.PAGESIZE
            self.map.madvise(mmap.MADV_DONTNEED, start, offset + size - start)

    def close(self) -> None:
        """End the mapping, so that a file that is removed leaves the disk; a later use maps it
        again."""
        self.__dict__.pop("map", None)

    @cached_property
    def map(self) -> mmap.mmap:
        """All of the file."""
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class MappedFiles:
    """Files of a folder by name, of which those used last are mapped."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._files = {name: MappedFile(folder / name) for name in names}
        self._used: dict[str, None] = {}  # the one used last at the end
        self._lock = Lock()

    def __getitem__(self, name: str) -> MappedFile:
        with self._lock:
            self._used.pop(name, None)
            self._used[name] = None
            if len(self._used) > _OPEN:
                oldest = next(iter(self._used))
                del self._used[oldest]
                self._files[oldest].close()
        return self._files[name]
