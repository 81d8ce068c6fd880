"""One safetensors file, mapped read-only: raw words of any tensor without loading the file.

Memory stays small however large the file is: whoever reads through `gather` or `read` gets copies,
and the mapped pages are handed back to the system at once.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np

from deltakit.dtypes import BY_CODE, DTYPES, Array, DType
from deltakit.errors import CoordinateError, FormatError, MissingFileError
from deltakit.formats import safetensors_header

_GATHER_CHUNK = 256  # entries
GATHER_MAPPED = _GATHER_CHUNK * 2**16  # bytes: a fault maps up to 64 kB around an entry
_SCATTERED = 2**15  # bytes of a tensor per entry from which on entries are read one by one
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor stands and what it is.

    dtype: torch's name ("bfloat16"), or the code of safetensors ("F4") where deltakit cannot read
    the elements. shape: as stored. file: the file that holds it. offset: of its first byte in the
    file. nbytes: its size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return prod(self.shape)

    @property
    def kind(self) -> DType:
        """The dtype, resolved; FormatError for one that deltakit cannot read."""
        if self.dtype not in DTYPES:
            raise FormatError(
                f"{self.file}: tensor {self.name!r} has dtype {self.dtype}, which deltakit "
                "cannot read"
            )
        return DTYPES[self.dtype]


class SafetensorsFile:
    """A safetensors file, its header checked, its body mapped when first needed.

    Raises MissingFileError when the file cannot be opened and FormatError when its header is not
    what safetensors demands.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header = self._read_header()
        offset = self.header.body_offset
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(
                name,
                BY_CODE[entry.dtype].name if entry.dtype in BY_CODE else entry.dtype,
                entry.shape,
                self.path,
                offset + entry.start,
                entry.nbytes,
            )
            for name, entry in self.header.entries.items()
        }

    def head(self) -> bytes:
        """The header as it stands in the file, its length bytes included."""
        with self.path.open("rb") as file:
            return file.read(self.header.body_offset)

    def words(self, name: str) -> Array:
        """The raw words of a tensor, flat, as a read-only view of the mapped file."""
        info = self._info(name)
        kind = info.kind
        return np.ndarray(info.numel, kind.words, buffer=self._map, offset=info.offset)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """A copy of the words [start, stop) of a tensor, leaving no mapped pages behind."""
        part = self.words(name)[start:stop]
        copied = part.copy()
        itemsize = part.dtype.itemsize
        self._release(self._info(name).offset + start * itemsize, part.size * itemsize)
        return copied

    def gather(self, name: str, indices: Array) -> Array:
        """The words of a tensor at flat `indices` (int64 [n], any order), [n].

        Raises CoordinateError for an index outside the tensor.
        """
        words = self.words(name)
        if len(indices) * _SCATTERED < words.nbytes:
            return self._read_each(name, indices)
        out = np.empty(len(indices), words.dtype)
        for at in range(0, len(indices), _GATHER_CHUNK):
            part = indices[at : at + _GATHER_CHUNK]
            low, high = self._range(name, part)
            out[at : at + _GATHER_CHUNK] = words[part]
            first = self._info(name).offset + low * words.itemsize
            self._release(first, (high - low + 1) * words.itemsize)
        return out

    def _read_each(self, name: str, indices: Array) -> Array:
        """`gather` for entries so far apart that mapping, let alone reading ahead, costs more than
        a call for each."""
        info = self._info(name)
        if indices.size:
            self._range(name, indices)
        size = info.kind.itemsize
        found = []
        with self.path.open("rb", buffering=0) as file:
            for place in (info.offset + indices * size).tolist():
                file.seek(place)
                found.append(file.read(size))
        return np.frombuffer(bytearray().join(found), info.kind.words)

    def _range(self, name: str, indices: Array) -> tuple[int, int]:
        """The least and the largest index; CoordinateError when one is outside the tensor."""
        low, high = int(indices.min()), int(indices.max())
        numel = self._info(name).numel
        if low < 0 or high >= numel:
            raise CoordinateError(
                f"{self.path}: tensor {name!r} has {numel} elements, "
                f"index {low if low < 0 else high} is outside"
            )
        return low, high

    @cached_property
    def _map(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CoordinateError(f"{self.path} has no tensor {name!r}") from None

    def _release(self, offset: int, size: int) -> None:
        """Hand mapped pages back; the system's file cache keeps them, and a later use maps them
        again."""
        if size and hasattr(mmap, "MADV_DONTNEED"):
            start = offset - offset % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, offset + size - start)

    def release(self) -> None:
        """Close the mapping, so that a file that is removed leaves the disk; using it maps it again."""
        self.__dict__.pop("_map", None)

    def _read_header(self) -> safetensors_header.Header:
        try:
            with self.path.open("rb") as file:
                return safetensors_header.read(file, str(self.path))
        except FormatError as error:
            if self.path.suffix in _PICKLES:
                raise FormatError(
                    f"{self.path} is no safetensors file; deltakit never unpickles, convert it to "
                    "safetensors first"
                ) from error
            raise
        except OSError as error:
            raise MissingFileError(f"cannot read {self.path}: {error.strerror}") from error
