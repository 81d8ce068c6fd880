"""One tensor as torch.save writes it: where its elements stand in the file, and in what order.

The file is a zip archive: `data.pkl` tells dtype, shape and strides, and `data/0` holds the elements.
The pickle is read as data (see `deltakit.formats.pickle_data`), so that nothing of it runs, and only
what torch.save says of a plain tensor on a CPU is understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltakit.dtypes import DTYPES
from deltakit.errors import FormatError
from deltakit.formats import pickle_data, zip_directory
from deltakit.formats.pickle_data import Made, Persistent
from deltakit.formats.zip_directory import Bytes, Stored

_LARGEST = 2**16  # bytes of the pickle of one tensor; it has some 200
_PARAMETER = "torch._utils._rebuild_parameter"
_TYPED, _UNTYPED = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
_STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
_BYTES = "torch.storage.UntypedStorage"
_ALLOWED = frozenset(
    [_PARAMETER, _TYPED, _UNTYPED, *_STORAGES, _BYTES, "collections.OrderedDict"]
    + [f"torch.{name}" for name in DTYPES]
)


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """A tensor in a file of torch.save.

    dtype: torch's name. shape: its size. strides: in elements, none negative. offset: of its first
    element, in bytes from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def find(archive: Bytes, what: str) -> TorchTensor:
    """The tensor that a whole file of torch.save holds, given as bytes or as a mapping of them.

    what: names it in messages. Raises FormatError for what torch.save does not write for a dense
    tensor of a known dtype on a little-endian machine, and where the elements are not all there.
    """
    if archive[:2] != b"PK":
        raise FormatError(
            f"{what}: no zip archive of torch.save; save with SerializationFormat.TORCH_SAVE, the default"
        )
    records = zip_directory.read(archive, what)
    pickles = [name for name in records if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1 or records[pickles[0]].size > _LARGEST:
        raise FormatError(f"{what}: no file of torch.save: it holds no data.pkl of one tensor")
    folder = pickles[0].removesuffix("data.pkl")
    order = records.get(f"{folder}byteorder")
    if order is not None and _content(archive, order) != b"little":
        raise FormatError(
            f"{what}: written on a big-endian machine; save it on a little-endian one"
        )
    told = pickle_data.read(_content(archive, records[pickles[0]]), f"{what}, data.pkl", _ALLOWED)
    try:
        return _placed(told, records, folder)
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f": {error}" if isinstance(error, ValueError) else ""
        raise FormatError(
            f"{what}: data.pkl does not describe a plain dense tensor{reason}; save plain tensors"
        ) from None


def _placed(told: Any, records: Mapping[str, Stored], folder: str) -> TorchTensor:
    if type(told) is Made and told.name == _PARAMETER:
        told = told.args[0]
    if type(told) is not Made or told.name not in (_TYPED, _UNTYPED) or told.state is not None:
        raise TypeError
    storage, start, shape, strides, _, _, *more = told.args
    dtype = more.pop(0).name.removeprefix("torch.") if told.name == _UNTYPED else None
    if any(more) or not (_are_sizes(shape) and _are_sizes(strides) and _are_sizes((start,))):
        raise ValueError("its shape and strides are none, or its values are conjugate or negative")
    dtype, key, held = _storage(storage, dtype)
    record = records.get(f"{folder}data/{key}")
    if record is None or record.size < held:
        raise ValueError(f"the file lacks elements of its storage {key[:20]!r}")
    itemsize = DTYPES[dtype].itemsize
    last = start + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if 0 not in shape and (last + 1) * itemsize > held:
        raise ValueError(f"shape {list(shape[:8])} needs more than the {held} bytes of its storage")
    return TorchTensor(dtype, shape, strides, record.offset + start * itemsize)


def _storage(storage: Any, dtype: str | None) -> tuple[str, str, int]:
    """Its dtype, the name of its record, and its size in bytes.

    dtype: as the tensor says it, for untyped storages.
    """
    if type(storage) is not Persistent:
        raise TypeError
    kind, made_by, key, _, count = storage.description
    if kind != "storage" or type(key) is not str or not _are_sizes((count,)):
        raise TypeError
    name = _STORAGES.get(made_by.name, "") if dtype is None else dtype
    if name not in DTYPES or (dtype is not None and made_by.name != _BYTES):
        raise TypeError
    return name, key, count * (DTYPES[name].itemsize if dtype is None else 1)


def _are_sizes(found: Any) -> bool:
    return type(found) is tuple and all(type(n) is int and n >= 0 for n in found)


def _content(archive: Bytes, place: Stored) -> bytes:
    return bytes(archive[place.offset : place.offset + place.size])
