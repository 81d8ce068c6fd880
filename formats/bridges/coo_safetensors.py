"""Plain COO in safetensors: `{name}.indices` and `{name}.values`, as RL weight syncs write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import DTYPES, Array, dtype_of
from deltakit.errors import BaseMismatchError, ConfigError, DeltakitError, FormatError
from deltakit.formats import strict_json
from deltakit.formats.atomic import write_bytes
from deltakit.formats.bridges import container
from deltakit.formats.bridges.bridge import BRIDGES, Bridge, Options, Reading, needed
from deltakit.formats.bridges.entries import in_order
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.record_json import is_shape
from deltakit.formats.safetensors_file import SafetensorsFile
from deltakit.formats.sdelta import is_sdelta

METADATA = "deltakit.coo"  # JSON: {"version": 1, "tensors": {name: {shape, dtype, mode}}}
INDICES, VALUES = ".indices", ".values"


@BRIDGES.register("coo-safetensors", "flat indices and values in safetensors", "grail, TRL; 2026")
class CooSafetensors(Bridge):
    """`{name}.indices` int32 or int64 [nnz], flat and row-major, and `{name}.values` [nnz].

    deltakit writes shapes, dtypes and modes into the metadata. Files without them need the base,
    and to be told what the values are: new weights in the base's dtype (`set`, as grail and vLLM
    have it) or differences (`add`). Extras stand under their own names.
    """

    name = "coo-safetensors"

    def recognise(self, path: Path) -> str | None:
        if not path.is_file() or is_sdelta(path):
            return None
        try:
            file = SafetensorsFile(path)
            names = _names(file)
        except (DeltakitError, OSError):
            return None
        plain = METADATA not in file.header.metadata
        if not names or (plain and len(file.tensors) != 2 * len(names)):
            return None
        return f"COO safetensors, {len(names)} tensors"

    def read(self, path: Path, *, base: Checkpoint | None, options: Options) -> Reading:
        file = SafetensorsFile(path)
        names = _names(file)
        described = _described(file, names)
        records = described or _from_base(file, names, base, options)
        tensors = {name: _tensor(file, name, records[name]) for name in names}
        held = {name + ending for name in names for ending in (INDICES, VALUES)}
        extras = {key: _array(file, key) for key in file.tensors if key not in held}
        notes = []
        if not described:
            notes.append(f"shapes are taken from the base, values as {options.mode}, as asked")
        return Reading(SparseDelta(tensors=tensors, extras=extras), tuple(notes))

    def write(
        self, delta: SparseDelta, path: Path, *, base: Checkpoint | None, options: Options
    ) -> tuple[str, ...]:
        write_bytes(path, encode(delta))
        return tuple(lost(delta))


def encode(delta: SparseDelta) -> bytes:
    """The bytes of the file; ConfigError for an extra whose name an index array needs."""
    arrays: dict[str, Array] = {}
    records = {}
    for name, tensor in delta.tensors.items():
        narrow = tensor.numel <= 2**31
        arrays[name + INDICES] = tensor.indices.astype(np.int32 if narrow else np.int64)
        arrays[name + VALUES] = typed_values(tensor)
        records[name] = {"shape": list(tensor.shape), "dtype": tensor.dtype, "mode": tensor.mode}
    clash = sorted(n for n in delta.extras if n.endswith((INDICES, VALUES)))
    if clash:
        raise ConfigError(f"extra {clash[0]!r} has a name that stands for indices or values")
    told = strict_json.dumps({"version": 1, "tensors": records})
    return container.encode({**arrays, **delta.extras}, {METADATA: told})


def typed_values(tensor: TensorDelta) -> Array:
    """Differences (add), or weights in the tensor's own dtype (set), [nnz]."""
    return tensor.values if tensor.mode == "add" else tensor.values.view(tensor.kind.numpy)


def lost(delta: SparseDelta) -> list[str]:
    """What a delta has and plain COO has not, a note each."""
    tensors = delta.tensors.values()
    parts = {
        "the order of unmasking": any(t.order is not None for t in tensors),
        "the base's values": any(t.base_values is not None for t in tensors),
        "the dtype of training": any(t.trained_dtype != t.dtype for t in tensors),
        "the base's identity": delta.base is not None,
        "changes of config.json": bool(delta.config),
        "the provenance": bool(delta.provenance),
    }
    gone = [part for part, there in parts.items() if there]
    return [f"not held by this format, so lost: {', '.join(gone)}"] if gone else []


def _names(file: SafetensorsFile) -> list[str]:
    """Names that have both indices and values; FormatError where one of the two is missing."""
    names = [key.removesuffix(INDICES) for key in file.tensors if key.endswith(INDICES)]
    values = {key.removesuffix(VALUES) for key in file.tensors if key.endswith(VALUES)}
    odd = sorted(values ^ set(names))
    if odd:
        raise FormatError(f"{file.path}: {odd[0]!r} has indices or values, not both")
    return sorted(names, key=str.encode)


def _described(file: SafetensorsFile, names: list[str]) -> Mapping[str, Any] | None:
    """Name -> shape, dtype and mode, from the metadata; None for files of others."""
    text = file.header.metadata.get(METADATA)
    if text is None:
        return None
    content = strict_json.loads(text.encode(), f"{file.path}: {METADATA}")
    records = content.get("tensors") if isinstance(content, dict) else None
    if not isinstance(records, dict) or content.get("version") != 1 or set(records) != set(names):
        raise FormatError(f"{file.path}: {METADATA} does not describe the tensors of the file")
    for name, record in records.items():
        fits = isinstance(record, dict) and set(record) == {"shape", "dtype", "mode"}
        if not fits or not is_shape(record["shape"]) or record["dtype"] not in DTYPES:
            raise FormatError(f"{file.path}: {METADATA}: tensor {name!r} has no shape and dtype")
    return records


def _from_base(
    file: SafetensorsFile, names: list[str], base: Checkpoint | None, options: Options
) -> Mapping[str, Any]:
    checkpoint = needed(base, f"{file.path} has no shapes of its tensors")
    if options.mode is None:
        raise ConfigError(
            f"{file.path} does not say what its values are: new weights (--mode set) or "
            "differences (--mode add)"
        )
    records = {}
    for name in names:
        info = checkpoint.info(name)
        records[name] = {"shape": info.shape, "dtype": info.dtype, "mode": options.mode}
    return records


def _tensor(file: SafetensorsFile, name: str, record: Mapping[str, Any]) -> TensorDelta:
    values = _array(file, name + VALUES)
    found = dtype_of(values)
    if record["mode"] == "set" and found.name != record["dtype"]:
        raise BaseMismatchError(
            f"{file.path}: tensor {name!r} has values of {found.name}, the weights are "
            f"{record['dtype']}; new weights must be of the base's own dtype"
        )
    if record["mode"] == "add" and not found.is_floating:
        raise FormatError(f"{file.path}: tensor {name!r} has differences of {found.name}")
    shape = tuple(record["shape"])
    indices, values = in_order(name, shape, _array(file, name + INDICES), values)
    return TensorDelta(
        name=name,
        shape=shape,
        dtype=record["dtype"],
        mode=record["mode"],
        indices=indices,
        values=values,
    )


def _array(file: SafetensorsFile, key: str) -> Array:
    info = file.tensors[key]
    return file.read(key).view(info.kind.numpy).reshape(info.shape)
