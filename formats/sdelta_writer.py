"""From a delta to the bytes of an `.sdelta` file; equal content gives equal bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from deltakit.delta import Fingerprint, SparseDelta, TensorDelta
from deltakit.dtypes import Array, dtype_of
from deltakit.errors import DeltaError, FormatError
from deltakit.formats import bits, codings, header_json, safetensors_header
from deltakit.formats.coding import Place
from deltakit.formats.header import RESERVED, ExtraRecord, SdeltaHeader, TensorRecord, layout
from deltakit.formats.values import encode_values, order_width, value_dtype

METADATA_KEY = "sdelta"


def pieces(
    delta: SparseDelta,
    *,
    values: str | None = None,
    order: bool = True,
    base_values: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[bytes]:
    """The bytes of the file, in order, piece by piece; see `deltakit.formats.sdelta.save`."""
    if sys.byteorder != "little":
        raise FormatError("sdelta files are little-endian; this machine is not, and cannot write")
    records: dict[str, TensorRecord] = {}
    streams: dict[str, list[bytes]] = {}
    done = 0
    for tensor in delta.tensors.values():
        known = None if delta.base is None else delta.base.tensors.get(tensor.name)
        record, parts = tensor_streams(tensor, known, values, order, base_values)
        records[tensor.name] = record
        for name, data in zip(record.streams(), parts, strict=True):
            streams.setdefault(name, []).append(data)
        done += tensor.nnz
        if progress is not None:
            progress(done, delta.nnz)
    extras = {}
    for name, array in delta.extras.items():
        extras[name], data = extra_stream(name, array)
        streams[name] = [data]
    header = SdeltaHeader(
        tensors=records,
        extras=extras,
        base=delta.base,
        config=delta.config,
        provenance=delta.provenance,
        adapter=delta.adapter,
    )
    entries = layout(header)
    yield safetensors_header.render(entries, {METADATA_KEY: header_json.dumps(header)})
    for name in entries:
        yield from streams[name]


def tensor_streams(
    tensor: TensorDelta,
    known: Fingerprint | None,
    values: str | None = None,
    order: bool = True,
    base_values: bool = True,
) -> tuple[TensorRecord, list[bytes]]:
    """The record of `tensor`, whose base is `known` by this fingerprint, and its streams, in the
    order of `TensorRecord.streams`."""
    where = f"tensor {tensor.name!r}"
    kind = value_dtype(tensor, values)
    place = Place(tensor.name, tensor.shape, tensor.nnz, tensor.seed, where)
    coding, offer = codings.choose(tensor.indices, place)
    parts = [offer.encode(), encode_values(tensor, kind)]
    width = None
    if order and tensor.order is not None:
        width = order_width(tensor.order)
        parts.append(bits.pack(tensor.order, width))
    if base_values and tensor.base_values is not None:
        parts.append(tensor.base_values.tobytes())
    digests = [_digest(data) for data in parts]
    base_digest = digests.pop() if base_values and tensor.base_values is not None else None
    order_digest = digests.pop() if width is not None else None
    record = TensorRecord(
        name=tensor.name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        trained_dtype=tensor.trained_dtype,
        mode=tensor.mode,
        nnz=tensor.nnz,
        coding=coding,
        seed=tensor.seed,
        index_bytes=len(parts[0]),
        indices_sha256=digests[0],
        value_dtype=kind.name,
        values_sha256=digests[1],
        order_bits=width,
        order_sha256=order_digest,
        base_values=base_values and tensor.base_values is not None,
        base_values_sha256=base_digest,
        sample=None if known is None else known.sample,
        support=None if known is None else known.support,
    )
    return record, parts


def extra_stream(name: str, array: Array) -> tuple[ExtraRecord, bytes]:
    """The record of an extra and its bytes."""
    if name.startswith(RESERVED) or name == "__metadata__":
        raise DeltaError(f"extra {name!r}: names that begin with {RESERVED!r} are reserved")
    kind = dtype_of(array)
    data = array.astype(kind.numpy, copy=False).tobytes()  # row-major and little-endian
    return ExtraRecord(name, kind.name, array.shape, _digest(data)), data


def _digest(data: bytes) -> str | None:
    return header_json.digest(data) if data else None
