"""Tensors in chunks as the weight file that a merge makes of them: what `SafetensorsFile` is for a file
that is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import CoordinateError
from deltakit.formats import rewrite, safetensors_header
from deltakit.formats.chunked_tensor import ChunkedTensor
from deltakit.formats.rewrite import Part, Piece
from deltakit.formats.safetensors_file import Reader, TensorInfo


class DcpShard:
    """A weight file that is not there: its name, its header, and its tensors, read from chunks."""

    def __init__(self, path: Path, chunked: Sequence[ChunkedTensor]) -> None:
        self.path = path
        by_name = {tensor.info.name: tensor for tensor in chunked}
        parts = rewrite.arranged([_part(tensor) for tensor in chunked])
        self._chunked = {part.name: by_name[part.name] for part in parts}
        self._head = rewrite.header(parts, {"format": "pt"})
        size = len(self._head) + sum(part.nbytes for part in parts)
        self.header = safetensors_header.parse(self._head, size, str(path))
        self.tensors: Mapping[str, TensorInfo] = {n: t.info for n, t in self._chunked.items()}

    def head(self) -> bytes:
        """The header as it would stand in the file, its length bytes included."""
        return self._head

    def words(self, name: str) -> Array:
        """The raw words of a tensor, flat: a read-only view of a mapped file where one chunk holds
        it, a copy otherwise."""
        return self._tensor(name).words()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """A copy of the words [start, stop) of a tensor, leaving no mapped pages behind."""
        tensor = self._tensor(name)
        start, stop, _ = slice(start, stop).indices(tensor.info.numel)
        return tensor.read(start, stop)

    def gather(self, name: str, indices: Array) -> Array:
        """The words of a tensor at flat `indices` (int64 [n], any order), [n].

        Raises CoordinateError for an index outside the tensor.
        """
        return self._tensor(name).gather(indices)

    @contextmanager
    def reader(self, name: str) -> Iterator[Reader]:
        """For the length of a `with`, what fills an array with the words of a tensor from the flat
        position `start` on."""
        tensor = self._tensor(name)

        def read(start: int, words: Array) -> None:
            np.copyto(words, tensor.read(start, start + len(words)))

        yield read

    def pieces(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Piece]:
        """The bytes of the flat elements [start, stop) of a tensor."""
        return self._tensor(name).pieces(start, stop)

    def release(self) -> None:
        """Files that have not been used for a while are let go of anyway."""

    def _tensor(self, name: str) -> ChunkedTensor:
        try:
            return self._chunked[name]
        except KeyError:
            raise CoordinateError(f"{self.path} has no tensor {name!r}") from None


def _part(tensor: ChunkedTensor) -> Part:
    info = tensor.info
    return Part(info.name, info.kind.code, info.shape, info.nbytes, tensor.pieces)
