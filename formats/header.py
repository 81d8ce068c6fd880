"""What the header of an `.sdelta` file says, and where the bytes of each tensor follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from deltakit.adapter import Adapter
from deltakit.delta import BaseIdentity, Mode
from deltakit.dtypes import DTYPES, DType
from deltakit.formats import bits
from deltakit.formats.safetensors_header import Entry

VERSION = 2  # the newest that is read
RESERVED = "sdelta."  # beginning of the names of all streams


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """All that the header tells about one sparse tensor.

    dtype, trained_dtype, value_dtype: torch's names. index_bytes: size of the index stream in
    bytes. order_bits: bits per entry of the order stream, None without one. base_values: whether
    there is a base-value stream. *_sha256: base64url, None for streams of no bytes. sample and
    support: the fingerprints of the base, None where there are none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trained_dtype: str
    mode: Mode
    nnz: int
    coding: str
    seed: int | None
    index_bytes: int
    indices_sha256: str | None
    value_dtype: str
    values_sha256: str | None
    order_bits: int | None
    order_sha256: str | None
    base_values: bool
    base_values_sha256: str | None
    sample: str | None
    support: str | None

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape)

    @property
    def value_bytes(self) -> int:
        """Bytes of the value stream."""
        return self.nnz * DTYPES[self.value_dtype].itemsize

    @property
    def order_bytes(self) -> int:
        """Bytes of the order stream."""
        return bits.packed_size(self.nnz, self.order_bits or 0)

    @property
    def base_bytes(self) -> int:
        """Bytes of the base-value stream."""
        return self.nnz * DTYPES[self.dtype].itemsize if self.base_values else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all streams; the header is not counted."""
        return self.index_bytes + self.value_bytes + self.order_bytes + self.base_bytes

    def streams(self) -> dict[str, tuple[DType, int, str | None]]:
        """Each stream that this tensor has a part in: its name in the file -> the stream's dtype,
        the bytes of this tensor, and their digest."""
        parts = {"sdelta.indices": (DTYPES["uint8"], self.index_bytes, self.indices_sha256)}
        values = DTYPES[self.value_dtype]
        parts[f"sdelta.values.{values.name}"] = (values, self.value_bytes, self.values_sha256)
        if self.order_bits is not None:
            parts["sdelta.order"] = (DTYPES["uint8"], self.order_bytes, self.order_sha256)
        if self.base_values:
            kind = DTYPES[self.dtype]
            parts[f"sdelta.base.{kind.name}"] = (kind, self.base_bytes, self.base_values_sha256)
        return parts


@dataclass(frozen=True, slots=True)
class ExtraRecord:
    """One extra: its name, torch's name of its dtype, its shape and its digest (see above)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str | None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class SdeltaHeader:
    """A whole header. `tensors` and `extras` are in bytewise order of their names."""

    tensors: Mapping[str, TensorRecord]
    extras: Mapping[str, ExtraRecord] = field(default_factory=dict)
    base: BaseIdentity | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    adapter: Adapter | None = None

    @property
    def version(self) -> int:
        """The oldest version of the format that can say this: older readers read what they can."""
        return 1 if self.adapter is None else 2

    @property
    def nnz(self) -> int:
        """Entries over all tensors."""
        return sum(record.nnz for record in self.tensors.values())


def layout(header: SdeltaHeader) -> dict[str, Entry]:
    """The safetensors entries that a file with this header has, and no others.

    Streams of no bytes are left out. Larger elements stand first and names in bytewise order, so
    that everything is aligned to its element size without holes.
    """
    sizes: dict[str, tuple[DType, tuple[int, ...], int]] = {
        extra.name: (DTYPES[extra.dtype], extra.shape, extra.nbytes)
        for extra in header.extras.values()
    }
    totals: dict[str, tuple[DType, int]] = {}
    for record in header.tensors.values():
        for name, (kind, size, _) in record.streams().items():
            totals[name] = (kind, totals.get(name, (kind, 0))[1] + size)
    for name, (kind, size) in totals.items():
        if size:
            sizes[name] = (kind, (size // kind.itemsize,), size)
    entries: dict[str, Entry] = {}
    position = 0
    for name in sorted(sizes, key=lambda n: (-sizes[n][0].itemsize, n.encode("utf-8"))):
        kind, shape, size = sizes[name]
        entries[name] = Entry(kind.code, shape, position, position + size)
        position += size
    return entries


def extents(header: SdeltaHeader) -> dict[str, dict[str, tuple[int, int]]]:
    """Tensor name -> stream name -> its byte range [start, end) in the body of the file.

    Within a stream the parts of the tensors follow each other in the order of the tensors.
    """
    position = {name: entry.start for name, entry in layout(header).items()}
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for record in header.tensors.values():
        ranges = {}
        for name, (_, size, _) in record.streams().items():
            start = position.get(name, 0)
            ranges[name] = (start, start + size)
            position[name] = start + size
        found[record.name] = ranges
    return found
