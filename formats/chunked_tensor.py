"""A tensor that was saved in chunks, read by the flat indices of the whole.

The chunks are windows of files, each a file of torch.save in itself. One is looked into when its
elements are first asked for, so that opening a checkpoint costs nothing per chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import FormatError
from deltakit.formats import torch_tensor
from deltakit.formats.chunk_grid import Box, ChunkGrid, Sizes, flat_boxes
from deltakit.formats.dcp_metadata import StoredTensor
from deltakit.formats.mapped_file import MappedFile, MappedFiles
from deltakit.formats.rewrite import Copied, Piece
from deltakit.formats.safetensors_file import TensorInfo, check_indices

_WINDOW = 2**20  # elements that are put together at a time
_SPREAD = 4  # times the bytes wanted that are read at most to get at them


class ChunkedTensor:
    """The elements of a tensor, given by where its chunks are stored.

    files: those of the directory. Raises FormatError where the chunks do not make up the
    tensor exactly, and when reading one that is not what the metadata say.
    """

    def __init__(self, info: TensorInfo, stored: StoredTensor, files: MappedFiles) -> None:
        self.info = info
        self._stored, self._files = stored.chunks, files
        self._shape = info.shape or (1,)
        offsets = [chunk.offsets if info.shape else (0,) for chunk in stored.chunks]
        sizes = [chunk.sizes if info.shape else (1,) for chunk in stored.chunks]
        try:
            self._grid = ChunkGrid(self._shape, offsets, sizes)
        except ValueError as error:
            raise FormatError(
                f"{info.file}: tensor {info.name!r} of shape {list(info.shape)}: {error}; save the "
                "checkpoint again, whole"
            ) from None
        self._places: dict[int, tuple[int, Sizes]] = {}

    def words(self) -> Array:
        """All raw words, flat: a read-only view where they stand together, a copy otherwise."""
        whole = self._whole()
        if whole is None:
            return self.read(0, self.info.numel)
        return self._file(0).array(whole, (self.info.numel,), self.info.kind.words)

    def read(self, start: int, stop: int) -> Array:
        """A copy of the words [start, stop), leaving no mapped pages behind."""
        out = np.empty(max(0, stop - start), self.info.kind.words)
        at = 0
        for low, high in flat_boxes(self._shape, start, stop):
            sizes = tuple(b - a for a, b in zip(low, high, strict=True))
            target = out[at : at + prod(sizes)].reshape(sizes)
            at += target.size
            for chunk, part in self._grid.parts((low, high)):
                self._copy(chunk, part, target[_slices(part, low)])
        return out

    def gather(self, indices: Array) -> Array:
        """The words at flat `indices` (int64 [n], any order), [n].

        Takes O(n) memory. Raises CoordinateError for an index outside the tensor.
        """
        check_indices(self.info, indices, self.info.file)
        out = np.empty(len(indices), self.info.kind.words)
        if not indices.size:
            return out
        whole = self._whole()
        if whole is not None:
            return self._file(0).gather(whole, self.info.numel, out.dtype, indices)
        coordinates = np.unravel_index(indices, self._shape)
        owners = self._grid.owners(coordinates)
        order = np.argsort(owners, kind="stable")
        found, begins = np.unique(owners[order], return_index=True)
        for chunk, mine in zip(found.tolist(), np.split(order, begins[1:]), strict=True):
            offset, strides = self._place(chunk)
            starts = self._grid.starts[chunk].tolist()
            inside = np.zeros(len(mine), np.int64)
            for axis, start, step in zip(coordinates, starts, strides, strict=True):
                inside += (axis[mine] - start) * step
            span = self._last(chunk, self._sizes(chunk)) + 1
            out[mine] = self._file(chunk).gather(offset, span, out.dtype, inside)
        return out

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[Piece]:
        """The bytes of the flat elements [start, stop), in order: ranges of files where these hold
        them so, otherwise put together in memory, a window at a time."""
        at = start
        for low, high in flat_boxes(self._shape, start, self.info.numel if stop is None else stop):
            parts = sorted(self._grid.parts((low, high)), key=lambda each: each[1])
            runs = [self._run(chunk, part) for chunk, part in parts]
            size = prod(b - a for a, b in zip(low, high, strict=True))
            if None not in runs and _are_in_order([part for _, part in parts], (low, high)):
                for (chunk, part), offset in zip(parts, runs, strict=True):
                    assert offset is not None
                    count = prod(b - a for a, b in zip(*part, strict=True))
                    nbytes = count * self.info.kind.itemsize
                    yield Copied(self._file(chunk).path, offset, nbytes)
            else:
                for first in range(at, at + size, _WINDOW):
                    words = self.read(first, min(first + _WINDOW, at + size))
                    yield words.view(np.uint8).data
            at += size

    def _whole(self) -> int | None:
        """Where all elements start, if they stand row-major in one chunk."""
        if len(self._stored) != 1:
            return None
        return self._run(0, ((0,) * len(self._shape), self._shape))

    def _file(self, chunk: int) -> MappedFile:
        return self._files[self._stored[chunk].file]

    def _sizes(self, chunk: int) -> Sizes:
        return self._stored[chunk].sizes or (1,)

    def _place(self, chunk: int) -> tuple[int, Sizes]:
        """Byte of the chunk's first element in its file, and its strides in elements."""
        if chunk not in self._places:
            stored, file = self._stored[chunk], self._file(chunk)
            what = f"{file.path}: tensor {self.info.name!r} at {list(stored.offsets)}"
            window = memoryview(file.map)[stored.offset : stored.offset + stored.length]
            found = torch_tensor.find(window, what)
            file.release(stored.offset, stored.length)
            if (found.dtype, found.shape) != (self.info.dtype, stored.sizes):
                raise FormatError(
                    f"{what} is {found.dtype} of shape {list(found.shape[:8])}, expected "
                    f"{self.info.dtype} of {list(stored.sizes)}; the files are of another checkpoint"
                )
            self._places[chunk] = stored.offset + found.offset, found.strides or (1,)
        return self._places[chunk]

    def _first(self, chunk: int, coordinates: Sizes) -> int:
        """Elements of the chunk's storage before the one at `coordinates` of the tensor."""
        starts, strides = self._grid.starts[chunk].tolist(), self._place(chunk)[1]
        steps = zip(coordinates, starts, strides, strict=True)
        return sum((n - start) * step for n, start, step in steps)

    def _last(self, chunk: int, sizes: Sizes) -> int:
        """Elements of the chunk's storage before the last of a box of `sizes` at its start."""
        return sum((n - 1) * step for n, step in zip(sizes, self._place(chunk)[1], strict=True))

    def _copy(self, chunk: int, part: Box, target: Array) -> None:
        offset, strides = self._place(chunk)
        size = target.itemsize
        offset += self._first(chunk, part[0]) * size
        steps = tuple(step * size for step in strides)
        span = (self._last(chunk, target.shape) + 1) * size
        file = self._file(chunk)
        if target.flags.c_contiguous and self._run(chunk, part) is not None:
            file.read_into(offset, target)
        elif span <= _SPREAD * target.nbytes:
            read = np.empty(span, np.uint8)
            file.read_into(offset, read)
            target[...] = np.ndarray(target.shape, target.dtype, read.data, strides=steps)
        else:  # columns of what was saved transposed
            target[...] = file.array(offset, target.shape, target.dtype, steps)
            file.release(offset, span)

    def _run(self, chunk: int, part: Box) -> int | None:
        """Where the part of the chunk starts in its file, if its elements stand there row-major
        without gaps."""
        offset, strides = self._place(chunk)
        expected = 1
        for low, high, step in reversed(list(zip(*part, strides, strict=True))):
            if high - low > 1:
                if step != expected:
                    return None
                expected *= high - low
        return offset + self._first(chunk, part[0]) * self.info.kind.itemsize


def _slices(part: Box, origin: Sizes) -> tuple[slice, ...]:
    """Where a part is in an array that starts at `origin`."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(*part, origin, strict=True))


def _are_in_order(parts: list[Box], whole: Box) -> bool:
    """Whether the elements of the box `whole`, row-major, are those of its sorted parts one after
    the other."""
    sizes = [high - low for low, high in zip(*whole, strict=True)]
    first = next((d for d, n in enumerate(sizes) if n > 1), 0)
    behind = [bounds[first + 1 :] for bounds in whole]
    return all([bounds[first + 1 :] for bounds in part] == behind for part in parts)
