"""Writing weightscope's patches, and what their reader needs as well."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.diffing.grown_rows import appended_to
from deltakit.dtypes import dtype_of
from deltakit.errors import ConfigError
from deltakit.formats import strict_json
from deltakit.formats.atomic import replacing
from deltakit.formats.bridges.bridge import needed
from deltakit.formats.checkpoint import Checkpoint

MAGIC = b"WSP2"
VERSION = "0.2"
DTYPE_NAMES = ("float32", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "int64")
_LEVEL = 10  # of zstd, weightscope's own choice
_HASHED = 2**22  # elements read at a time


def zstd(path: Path) -> Any:
    """The module `zstandard`; ConfigError, saying that `path` needs it, where it is missing."""
    try:
        import zstandard
    except ImportError:
        raise ConfigError(
            f"{path}: weightscope's patches are compressed with zstd; "
            "pip install 'deltakit-sparse[weightscope]'"
        ) from None
    return zstandard


def sha256_of(base: Checkpoint, name: str) -> str:
    """The sha256 of a base tensor's bytes, hexadecimal."""
    digest = hashlib.sha256()
    for start in range(0, base.info(name).numel, _HASHED):
        digest.update(base.read(name, start, start + _HASHED).data)
    return digest.hexdigest()


def write_patch(delta: SparseDelta, path: Path, base: Checkpoint | None) -> tuple[str, ...]:
    """Write `delta`, all of whose tensors are in set mode, as a patch; returns what was lost.

    Raises ConfigError without the base and for what a patch cannot hold.
    """
    checkpoint = needed(base, "a weightscope patch names digests of the base's tensors")
    blobs, records = [], []
    at = 0
    for tensor in (*delta.tensors.values(), *_replaced(delta, checkpoint)):
        width = 4 if tensor.numel < 2**32 else 8
        blobs += [tensor.indices.astype(f"<u{width}").tobytes(), tensor.values.tobytes()]
        size = tensor.nnz * (width + tensor.kind.itemsize)
        fields = {
            "n_changed": tensor.nnz,
            "index_width": width,
            "base_sha256": sha256_of(checkpoint, tensor.name),
        }
        records.append(_record("delta", tensor.name, tensor.shape, tensor.dtype, at, size) | fields)
        at += size
    for name, array in delta.extras.items():
        if name not in checkpoint.tensors:
            kind = dtype_of(array).name
            records.append(_record("new", name, array.shape, kind, at, array.nbytes))
            blobs.append(array.tobytes())
            at += array.nbytes
    known = (delta.base.model_id if delta.base else None) or checkpoint.model_id or ""
    header = {"version": VERSION, "model_a": known, "model_b": "", "threshold": 0.0}
    header |= {"codec": "csr-zstd", "tensors": records, "only_in_a": []}
    text = strict_json.compact(header).encode()
    compressor = zstd(path).ZstdCompressor(level=_LEVEL)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(MAGIC + len(text).to_bytes(4, "little") + text)
        with compressor.stream_writer(file, size=at, closefd=False) as stream:
            for blob in blobs:
                stream.write(blob)
    return _losses(delta)


def _record(
    kind: str, name: str, shape: tuple[int, ...], dtype: str, at: int, size: int
) -> dict[str, Any]:
    if dtype not in DTYPE_NAMES or appended_to(name) is not None:
        raise ConfigError(
            f"a weightscope patch cannot hold {name!r} ({dtype}): it knows {', '.join(DTYPE_NAMES)} "
            "and no rows appended to a tensor"
        )
    fields = {"kind": kind, "name": name, "shape": list(shape), "dtype": dtype}
    return fields | {"blob_offset": at, "blob_size": size}


def _replaced(delta: SparseDelta, base: Checkpoint) -> list[TensorDelta]:
    """Extras that the base has as well, as entries: weightscope lets the base's tensor win over a
    "new" one of the same name."""
    made = []
    for name, array in delta.extras.items():
        info = base.tensors.get(name)
        if info is None:
            continue
        if (info.shape, info.kind.numpy) != (array.shape, array.dtype):
            raise ConfigError(
                f"extra {name!r} is {array.dtype} {list(array.shape)}, {base.path} has "
                f"{info.dtype} {list(info.shape)}; a weightscope patch keeps dtype and shape"
            )
        made.append(
            TensorDelta(
                name=name,
                shape=info.shape,
                dtype=info.dtype,
                mode="set",
                indices=np.arange(info.numel),
                values=array.reshape(-1),
            )
        )
    return made


def _losses(delta: SparseDelta) -> tuple[str, ...]:
    lost = []
    if any(tensor.order is not None for tensor in delta.tensors.values()):
        lost.append("the order of unmasking is lost, so truncating by order is")
    if delta.config:
        lost.append(f"changes of config.json are lost: {', '.join(sorted(delta.config))}")
    return tuple(lost)
