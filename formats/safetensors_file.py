"""One safetensors file, mapped read-only: raw words of any tensor without loading the file.

Memory stays small however large the file is: whoever reads through `gather` or `read` gets copies,
and the mapped pages are handed back to the system at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from deltakit.dtypes import BY_CODE, DTYPES, Array, DType
from deltakit.errors import CoordinateError, FormatError, MissingFileError
from deltakit.formats import safetensors_header
from deltakit.formats.mapped_file import MappedFile
from deltakit.formats.rewrite import Copied, Piece

Reader = Callable[[int, Array], None]
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


def check_indices(info: TensorInfo, indices: Array, where: Path) -> None:
    """Raise CoordinateError where a flat index is outside a tensor; where: for the message."""
    if not indices.size:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= info.numel:
        raise CoordinateError(
            f"{where}: tensor {info.name!r} has {info.numel} elements, "
            f"index {low if low < 0 else high} is outside"
        )


class SafetensorsFile:
    """A safetensors file, its header checked, its body mapped when first needed.

    Raises MissingFileError when the file cannot be opened and FormatError when its header is not
    what safetensors demands.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._mapped = MappedFile(self.path)
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
        return self._mapped.array(info.offset, (info.numel,), info.kind.words)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """A copy of the words [start, stop) of a tensor, leaving no mapped pages behind."""
        part = self.words(name)[start:stop]
        copied = part.copy()
        itemsize = part.dtype.itemsize
        self._mapped.release(self._info(name).offset + start * itemsize, part.size * itemsize)
        return copied

    def gather(self, name: str, indices: Array) -> Array:
        """The words of a tensor at flat `indices` (int64 [n], any order), [n].

        Raises CoordinateError for an index outside the tensor.
        """
        info = self._info(name)
        check_indices(info, indices, self.path)
        return self._mapped.gather(info.offset, info.numel, info.kind.words, indices)

    @contextmanager
    def reader(self, name: str) -> Iterator[Reader]:
        """For the length of a `with`, what fills an array with the words of a tensor from the flat
        position `start` on, by plain reads."""
        info = self._info(name)

        def read(start: int, words: Array) -> None:
            rest = words.view(np.uint8).data
            file.seek(info.offset + start * words.itemsize)
            while rest.nbytes:
                size = file.readinto(rest)
                if not size:
                    raise FormatError(f"{info.file} became shorter while it was read")
                rest = rest[size:]

        with self.path.open("rb", buffering=0) as file:
            yield read

    def pieces(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Piece]:
        """The bytes of the flat elements [start, stop) of a tensor; of a dtype that deltakit cannot
        read, of all of them."""
        info = self._info(name)
        if stop is None:
            yield Copied(info.file, info.offset, info.nbytes)
        else:
            itemsize = info.kind.itemsize
            yield Copied(info.file, info.offset + start * itemsize, (stop - start) * itemsize)

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CoordinateError(f"{self.path} has no tensor {name!r}") from None

    def release(self) -> None:
        """Close the mapping, so that a file that is removed leaves the disk; using it maps it again."""
        self._mapped.close()

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
