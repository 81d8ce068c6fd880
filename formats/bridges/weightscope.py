"""Patches of weightscope 0.2 to 0.4, `.wsp` (https://pypi.org/project/weightscope).

"WSP2", the length of a JSON header as uint32 little-endian, the header, and one zstd stream of the
tensors' blobs. A "delta" record's blob is its sorted flat indices (uint32, or uint64 from 2^32
elements on) and the new values in the tensor's dtype; a "new" record's is a whole tensor. A delta
names the sha256 of the base tensor's bytes. Values replace, so tensors are in `set` mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from deltakit.delta import BaseIdentity, SparseDelta, TensorDelta
from deltakit.dtypes import DTYPES, Array, DType
from deltakit.errors import (
    BaseMismatchError,
    CoordinateError,
    DeltakitError,
    FormatError,
    UnsupportedVersionError,
)
from deltakit.formats import strict_json
from deltakit.formats.bridges.bridge import BRIDGES, Bridge, Options, Reading
from deltakit.formats.bridges.entries import in_order
from deltakit.formats.bridges.names import checkpoint_names
from deltakit.formats.bridges.weightscope_writer import (
    DTYPE_NAMES,
    MAGIC,
    VERSION,
    sha256_of,
    write_patch,
    zstd,
)
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.safetensors_header import MAX_ELEMENTS, MAX_HEADER

_CHUNK = 2**22  # bytes
_MAX_DIMENSIONS = 64


@dataclass(frozen=True, slots=True)
class _Record:
    """One tensor of a patch: `count` entries, or the whole tensor where `width` is 0."""

    name: str
    shape: tuple[int, ...]
    kind: DType
    offset: int  # of the blob in the decompressed stream, bytes
    count: int
    width: int  # bytes per index
    base_sha256: str

    @property
    def size(self) -> int:
        """Bytes of the blob."""
        return self.count * (self.width + self.kind.itemsize)


@BRIDGES.register("weightscope", "weightscope's patches (.wsp)", "weightscope 0.4")
class Weightscope(Bridge):
    """`.wsp` files, read and written. Needs the package `zstandard`."""

    name = "weightscope"
    writes = "set"

    def recognise(self, path: Path) -> str | None:
        try:
            with path.open("rb") as file:
                if file.read(len(MAGIC)) != MAGIC:
                    return None
                file.seek(0)
                records = _records(_header(file, path), path)
        except OSError:
            return None
        except DeltakitError:
            return "weightscope patch, damaged or of another version"  # reading tells what
        return f"weightscope patch, {len(records)} tensors"

    def read(self, path: Path, *, base: Checkpoint | None, options: Options) -> Reading:
        with path.open("rb") as file:
            header = _header(file, path)
            records = _records(header, path)
            touched = [record.name for record in records if record.width and record.count]
            whole = [record.name for record in records if not record.width]
            names = checkpoint_names(touched, base, whole)
            stream = zstd(path).ZstdDecompressor().stream_reader(file)
            tensors, extras, notes = {}, {}, _losses(header)
            for record in records:
                blob = _exactly(stream, record.size, path)
                if not record.width:
                    values = np.frombuffer(blob, record.kind.numpy).reshape(record.shape)
                    extras[names[record.name]] = values
                elif record.count:
                    tensor = _tensor(record, names[record.name], blob, base)
                    tensors[tensor.name] = tensor
                    if tensor.dtype != record.kind.name:
                        notes.append(
                            f"tensor {tensor.name!r}: {record.kind.name} values become "
                            f"{tensor.dtype}, as the base"
                        )
            if _piece(stream, 1, path):
                raise FormatError(f"{path}: the stream goes on behind the last tensor")
        model = header.get("model_a")
        known = BaseIdentity(model_id=model if isinstance(model, str) and model else None)
        return Reading(SparseDelta(tensors=tensors, extras=extras, base=known), tuple(notes))

    def write(
        self, delta: SparseDelta, path: Path, *, base: Checkpoint | None, options: Options
    ) -> tuple[str, ...]:
        return write_patch(delta, path, base)


def _header(file: BinaryIO, path: Path) -> Mapping[str, Any]:
    """The header of an open patch, leaving the file's position at the stream."""
    prefix = file.read(8)
    if len(prefix) < 8 or not prefix.startswith(MAGIC):
        raise FormatError(f"{path} is no weightscope patch: it does not begin with WSP2")
    size = int.from_bytes(prefix[4:], "little")
    if size > min(MAX_HEADER, path.stat().st_size):
        raise FormatError(f"{path}: a header of {size} bytes does not fit; the file is truncated")
    header = strict_json.loads(file.read(size), str(path))
    if not isinstance(header, dict) or not isinstance(header.get("tensors"), list):
        raise FormatError(f"{path}: the header lists no tensors")
    if header.get("version") != VERSION:
        raise UnsupportedVersionError(
            f"{path} is a patch of version {header.get('version')!r}, expected {VERSION!r}"
        )
    return header


def _records(header: Mapping[str, Any], path: Path) -> list[_Record]:
    """The records in the order of their blobs, which must follow on each other."""
    records = [_record(fields, path) for fields in header["tensors"]]
    if len({record.name for record in records}) != len(records):
        raise FormatError(f"{path}: a tensor stands twice in the header")
    position = 0
    for record in records:
        if record.offset != position:
            raise FormatError(
                f"{path}: tensor {record.name!r} begins at byte {record.offset} of the stream, "
                f"expected {position}"
            )
        position += record.size
    return records


def _record(fields: Any, path: Path) -> _Record:
    try:
        name, shape, dtype, kind = (fields[key] for key in ("name", "shape", "dtype", "kind"))
        offset, size = fields["blob_offset"], fields["blob_size"]
        count, width = (fields["n_changed"], fields["index_width"]) if kind == "delta" else (0, 0)
        sha256 = fields["base_sha256"] if kind == "delta" else ""
    except (KeyError, TypeError):
        raise FormatError(f"{path}: a tensor's record lacks a field") from None
    what = f"{path}: tensor {name!r}"
    sizes: list[Any] = [None]
    if isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS:
        sizes = [*shape, offset, size, count]
    if not isinstance(name, str) or kind not in ("delta", "new") or dtype not in DTYPE_NAMES:
        raise FormatError(f"{what}: a record of kind {kind!r} and dtype {dtype!r} is not known")
    if not all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in sizes):
        raise FormatError(f"{what}: shape, offset, size and count must be integers from 0")
    numel = 1
    for n in shape:
        numel *= n
    if kind == "new":
        count = numel
    elif width not in (4, 8) or not isinstance(sha256, str):
        raise FormatError(f"{what}: indices of {width!r} bytes are not known")
    record = _Record(name, tuple(shape), DTYPES[dtype], offset, count, width, sha256)
    if count > numel or record.size != size:
        raise FormatError(
            f"{what}: {count} values of shape {shape[:8]} take {record.size} bytes, found {size}"
        )
    return record


def _tensor(record: _Record, name: str, blob: bytes, base: Checkpoint | None) -> TensorDelta:
    """The entries of one tensor, its base checked against the digest in the patch."""
    found = np.frombuffer(blob, f"<u{record.width}", record.count)
    values = np.frombuffer(blob, record.kind.numpy, offset=record.count * record.width)
    indices, values = in_order(record.name, record.shape, found, values)
    before: Array | None = None
    if base is not None:
        info = base.info(name)
        if info.shape != record.shape:
            raise CoordinateError(
                f"tensor {name!r} has shape {list(record.shape)} in the patch and "
                f"{list(info.shape)} in {base.path}"
            )
        digest = sha256_of(base, name)
        if digest != record.base_sha256:
            raise BaseMismatchError(
                f"{base.path} is not the base of the patch: tensor {name!r} has sha256 "
                f"{digest[:16]}, expected {record.base_sha256[:16]}"
            )
        before = base.gather(name, indices)
        with np.errstate(over="ignore"):
            values = values.astype(info.kind.numpy)  # as weightscope applies it
    return TensorDelta(
        name=name,
        shape=record.shape,
        dtype=record.kind.name if base is None else base.info(name).dtype,
        mode="set",
        indices=indices,
        values=values,
        base_values=before,
    )


def _losses(header: Mapping[str, Any]) -> list[str]:
    notes = []
    threshold = header.get("threshold")
    if isinstance(threshold, (int, float)) and threshold > 0:
        notes.append(
            f"weightscope left out differences of up to {threshold:g} when it made the patch: "
            "merging gives what weightscope applies, not the tuned model"
        )
    removed = header.get("only_in_a")
    if isinstance(removed, list) and removed:
        notes.append(
            f"the patch removes {len(removed)} tensors (such as {removed[0]!r}), which a delta "
            "cannot; they stay as in the base"
        )
    return notes


def _piece(stream: Any, size: int, path: Path) -> bytes:
    try:
        return bytes(stream.read(size))
    except zstd(path).ZstdError as error:
        raise FormatError(f"{path}: the stream is damaged: {error}") from None


def _exactly(stream: Any, size: int, path: Path) -> bytes:
    """`size` bytes of the stream, in pieces, so that memory follows what is really there."""
    pieces, missing = [], size
    while missing:
        piece = _piece(stream, min(missing, _CHUNK), path)
        if not piece:
            raise FormatError(f"{path}: the stream ends {missing} bytes early; it is truncated")
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)
