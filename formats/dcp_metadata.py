"""The `.metadata` of a directory of torch.distributed.checkpoint: which tensors, cut how, and where.

The file is a pickle of torch's own data classes (torch/distributed/checkpoint/metadata.py, the same
from torch 2.4 to 2.13). It is read as data (`deltakit.formats.pickle_data`), without torch, and what
it says is believed only as far as it is checked here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from deltakit.dtypes import DTYPES
from deltakit.errors import FormatError, MissingFileError
from deltakit.formats import pickle_data
from deltakit.formats.checkpoint_files import DCP_METADATA
from deltakit.formats.pickle_data import Global, Made
from deltakit.formats.safetensors_header import MAX_ELEMENTS

MAX_METADATA = 2**29  # bytes; some 140 for each chunk
MAX_DIMS = 32  # NumPy's oldest limit
_DCP = "torch.distributed.checkpoint.metadata."
_WHERE = "torch.distributed.checkpoint.filesystem._StorageInfo"
_TENSOR, _BYTES = f"{_DCP}TensorStorageMetadata", f"{_DCP}BytesStorageMetadata"
_CHUNK, _INDEX, _SIZE = f"{_DCP}ChunkStorageMetadata", f"{_DCP}MetadataIndex", "torch.Size"
_EARLIER = "torch.distributed._shard.sharded_tensor.metadata."  # of properties, before torch 2.3
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_OTHER_DTYPES = ("complex32", "complex64", "complex128", "float8_e4m3fnuz", "float8_e5m2fnuz")
_ALLOWED = frozenset(
    [_TENSOR, _BYTES, _CHUNK, _INDEX, _SIZE, _WHERE, f"{_DCP}Metadata", f"{_DCP}StorageMeta"]
    + [f"{_DCP}TensorProperties", f"{_DCP}_MEM_FORMAT_ENCODING", "torch.serialization._get_layout"]
    + [f"{_EARLIER}TensorProperties", f"{_EARLIER}MEM_FORMAT_ENCODING"]
    + [f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS]
    + [f"torch.{name}" for name in (*DTYPES, *_OTHER_DTYPES)]
    + ["collections.OrderedDict"]
)
Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A box of a tensor: its place in the tensor, its shape, and the bytes [offset, offset + length)
    of a file of the directory in which torch.save has put it."""

    offsets: Sizes
    sizes: Sizes
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the metadata tell it: torch's name of its dtype, its shape, and its chunks, those
    without elements left out."""

    dtype: str
    shape: Sizes
    chunks: tuple[StoredChunk, ...]


class Metadata:
    """What `.metadata` tells, tensor by tensor.

    paths: name of every tensor -> the keys that lead to it in the state dict that was saved.
    others: names of what is no tensor. Raises MissingFileError and FormatError.
    """

    def __init__(self, folder: Path) -> None:
        self.what = str(folder / DCP_METADATA)
        told = _fields(pickle_data.read(_bytes(folder), self.what, _ALLOWED), f"{_DCP}Metadata")
        items, planned = told.get("state_dict_metadata"), told.get("planner_data")
        stored = told.get("storage_data")
        if type(items) is not dict or type(stored) is not dict:
            raise FormatError(f"{self.what}: no metadata of torch.distributed.checkpoint.save")
        self._tensors = {
            name: item
            for name, item in items.items()
            if type(item) is Made and item.name == _TENSOR
        }
        self._stored: dict[str, dict[Sizes, tuple[str, int, int]]] = {}
        for name, offsets, place in _located(stored, self.what):
            self._stored.setdefault(name, {})[offsets] = place
        self.paths = {name: _path(name, planned, self.what) for name in self._tensors}
        self.others = [str(name) for name in items if name not in self._tensors]

    def tensor(self, name: str) -> StoredTensor:
        """A tensor whose chunks are within its shape, each with a place in a file; FormatError
        otherwise. Whether they fit together is for `deltakit.formats.chunk_grid` to say."""
        what = f"{self.what}: tensor {name!r}"
        told = _fields(self._tensors[name], _TENSOR)
        properties = told.get("properties")
        state = properties.state if type(properties) is Made else None
        dtype = state[0] if type(state) is tuple and state else None
        if type(dtype) is not Global or not dtype.name.startswith("torch."):
            raise FormatError(f"{what} has no dtype")
        shape = _sizes(told.get("size"), what)
        chunks = told.get("chunks")
        if type(chunks) is not list:
            raise FormatError(f"{what} has no list of chunks")
        held = len(self._stored.get(name, ()))
        if len(chunks) > held:  # also one list that many tensors share, to be read again and again
            raise FormatError(f"{what} has {len(chunks)} chunks, of which {held} are stored")
        if prod(shape) > MAX_ELEMENTS:
            raise FormatError(f"{what}: shape {list(shape)} has too many elements")
        found = (self._chunk(name, chunk, shape, what) for chunk in chunks)
        whole = tuple(chunk for chunk in found if 0 not in chunk.sizes)
        return StoredTensor(dtype.name.removeprefix("torch."), shape, whole)

    def _chunk(self, name: str, told: Any, shape: Sizes, what: str) -> StoredChunk:
        fields = _fields(told, _CHUNK)
        offsets, sizes = (_sizes(fields.get(key), what) for key in ("offsets", "sizes"))
        within = len(offsets) == len(sizes) == len(shape) and all(
            offset + size <= whole
            for offset, size, whole in zip(offsets, sizes, shape, strict=True)
        )
        if not within:
            raise FormatError(
                f"{what}: a chunk of shape {list(sizes)} at {list(offsets)} is not within its shape "
                f"{list(shape)}"
            )
        try:
            return StoredChunk(offsets, sizes, *self._stored[name][offsets])
        except KeyError:
            raise FormatError(
                f"{what}: the chunk at {list(offsets)} is stored in no file"
            ) from None


def _bytes(folder: Path) -> bytes:
    path = folder / DCP_METADATA
    try:
        size = path.stat().st_size
        if size > MAX_METADATA:
            raise FormatError(
                f"{path} has {size} bytes, more than the {MAX_METADATA} that are read; save the "
                "model without its optimizer"
            )
        return path.read_bytes()
    except OSError as error:
        raise MissingFileError(f"cannot read {path}: {error.strerror}") from error


def _fields(made: Any, name: str) -> Mapping[Any, Any]:
    """The fields of an object of torch's data class `name`; none where it is something else."""
    fields = made.state if type(made) is Made and made.name == name else None
    return fields if type(fields) is dict else {}


def _sizes(made: Any, what: str) -> Sizes:
    """A torch.Size as a tuple."""
    sizes: Any = made.args[0] if type(made) is Made and made.name == _SIZE and made.args else None
    good = type(sizes) is tuple and len(sizes) <= MAX_DIMS
    if not good or not all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in sizes):
        raise FormatError(f"{what}: a shape or offset is none")
    return tuple(sizes)


def _path(name: Any, planned: Any, what: str) -> tuple[str, ...]:
    """The keys that lead to a tensor; its name alone where nothing is told of it."""
    path = planned.get(name, (name,)) if type(planned) is dict else (name,)
    if type(name) is not str or type(path) is not tuple or not path:
        raise FormatError(f"{what}: a tensor has no name")
    if not all(type(key) in (str, int) for key in path):
        raise FormatError(f"{what}: the path of tensor {name!r} is none")
    return tuple(str(key) for key in path)


def _located(
    stored: dict[Any, Any], what: str
) -> Iterator[tuple[str, Sizes, tuple[str, int, int]]]:
    """Name, offsets, and (file, offset, length) of every chunk; FormatError for a place that is
    outside of the directory or that only an extension of torch could read."""
    for index, info in stored.items():
        key, place = _fields(index, _INDEX), _fields(info, _WHERE)
        if key.get("offset") is None:
            continue  # no tensor
        name, file = key.get("fqn"), place.get("relative_path")
        offset, length = place.get("offset"), place.get("length")
        if type(name) is not str or type(file) is not str or not _is_plain(file):
            raise FormatError(
                f"{what}: tensor {str(name)[:100]!r} is stored in {str(file)[:100]!r}, which is no "
                "plain name of a file in the same folder"
            )
        if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
            raise FormatError(f"{what}: tensor {name!r} has no place in {file}")
        if place.get("transform_descriptors"):
            raise FormatError(
                f"{what}: tensor {name!r} was stored through an extension of torch (such as "
                "compression), which deltakit cannot read; save it without extensions"
            )
        yield name, _sizes(key["offset"], what), (file, offset, length)


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and len(name) <= 255 and not set(name) & set("/\\:\0")
