"""The header of a safetensors file: read under suspicion, written canonically.

A file is 8 bytes of little-endian header length, that many bytes of JSON, and the body. The JSON
maps each tensor's name to its dtype code, shape and byte range in the body, and `__metadata__` to
a mapping of strings (https://github.com/huggingface/safetensors#format). Nothing here looks at the
body, so a header can be judged from the first bytes of a file that is still far away.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from deltakit.errors import FormatError
from deltakit.formats import strict_json

MAX_HEADER = 100_000_000  # bytes of JSON, the limit of the safetensors library
MAX_ELEMENTS = 2**63 - 1

# Bits per element of every code known to safetensors 0.8. Any other code is passed on unread.
BITS: dict[str, int] = (
    dict.fromkeys(["F64", "I64", "U64", "C64"], 64)
    | dict.fromkeys(["F32", "I32", "U32"], 32)
    | dict.fromkeys(["F16", "BF16", "I16", "U16"], 16)
    | dict.fromkeys(["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"], 8)
    | dict.fromkeys(["F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8)
    | {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
)
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: its dtype code, its shape, and its byte range [start, end) in the body."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes in the body."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A whole header. Entries stand in the order of their bytes; the body starts at `body_offset`
    of the file and has `body_size` bytes."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)
    body_offset: int = 0
    body_size: int = 0


def header_size(prefix: bytes, file_size: int, where: str) -> int:
    """Bytes of the header, its 8 length bytes included, told from the first 8 bytes of the file.

    Raises FormatError when the length is beyond the file or beyond 100 MB.
    """
    if file_size < 8 or len(prefix) < 8:
        raise FormatError(f"{where}: {file_size} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER:
        raise FormatError(
            f"{where}: no safetensors file, or a broken one: its header would have {length} bytes, "
            f"more than {MAX_HEADER}"
        )
    if 8 + length > file_size:
        raise FormatError(
            f"{where}: the header needs {8 + length} bytes, the file has {file_size}; "
            "it is truncated or no safetensors file"
        )
    return 8 + length


def parse(prefix: bytes, file_size: int, where: str) -> Header:
    """The header at the start of a file.

    prefix: the first bytes of the file, the whole header at least (see `header_size`).
    where: the file's name, for messages. Raises FormatError when anything is not as safetensors
    demands: ranges that leave a hole, overlap or miss the end of the file, a dtype and shape that
    do not give the range's size, keys that stand twice, metadata that are not strings.
    """
    size = header_size(prefix, file_size, where)
    if len(prefix) < size:
        raise FormatError(f"{where}: {len(prefix)} bytes given, the header has {size}")
    text = bytes(prefix[8:size])
    if not text.startswith(b"{"):
        raise FormatError(f"{where}: no safetensors file: the header does not begin with '{{'")
    content = strict_json.loads(text, where)
    if not isinstance(content, dict):
        raise FormatError(f"{where}: the header is no JSON object")
    metadata = _metadata(content.pop("__metadata__", None), where)
    entries = {name: _entry(name, fields, where) for name, fields in content.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_ranges(ordered, file_size - size, where)
    return Header(ordered, metadata, size, file_size - size)


def read(file: BinaryIO, where: str) -> Header:
    """The header of an open file, leaving its position just behind the header."""
    file_size = file.seek(0, os.SEEK_END)
    file.seek(0)
    prefix = file.read(8)
    return parse(prefix + file.read(header_size(prefix, file_size, where) - 8), file_size, where)


def render(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """The canonical header: metadata first, tensors in the order of their bytes (then of their
    names), ASCII, padded with spaces so that the body starts at a multiple of 8."""
    content: dict[str, Any] = {}
    if metadata:
        content["__metadata__"] = dict(sorted(metadata.items()))
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[0].encode())):
        content[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.end],
        }
    text = strict_json.compact(content).encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise FormatError(f"the header would have {len(text)} bytes, more than {MAX_HEADER}")
    return len(text).to_bytes(8, "little") + text


def _metadata(found: Any, where: str) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise FormatError(f"{where}: __metadata__ must map names to strings")
    return found


def _entry(name: str, fields: Any, where: str) -> Entry:
    what = f"{where}: tensor {name!r}"
    strict_json.check_text(name, where)
    if not isinstance(fields, dict) or set(fields) != _FIELDS:
        raise FormatError(f"{what} must have exactly dtype, shape and data_offsets")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str):
        raise FormatError(f"{what}: the dtype is no string")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"{what}: shape and data_offsets must be lists of integers from 0")
    start, end = offsets
    if end < start:
        raise FormatError(f"{what}: data_offsets {offsets} end before they start")
    if code in BITS:
        bits = _elements(shape, what) * BITS[code]
        if bits % 8 or bits // 8 != end - start:
            raise FormatError(
                f"{what}: {code} of shape {shape[:8]} takes {bits / 8:g} bytes, "
                f"its data_offsets {offsets} hold {end - start}"
            )
    return Entry(code, tuple(shape), start, end)


def _are_sizes(found: Any) -> bool:
    return isinstance(found, list) and all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in found)


def _elements(shape: list[int], what: str) -> int:
    """The product of `shape`, refusing to compute products that no file can hold."""
    if 0 in shape:
        return 0
    count = 1
    for n in shape:
        count *= n
        if count > MAX_ELEMENTS:
            raise FormatError(f"{what}: shape {shape[:8]} has too many elements")
    return count


def _check_ranges(ordered: Mapping[str, Entry], body_size: int, where: str) -> None:
    position = 0
    for name, entry in ordered.items():
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a hole"
            raise FormatError(
                f"{where}: tensor {name!r} {kind}: it starts at byte {entry.start} of the body, "
                f"expected {position}"
            )
        position = entry.end
    if position != body_size:
        what = "is truncated" if position > body_size else "has bytes that belong to no tensor"
        raise FormatError(
            f"{where} {what}: its tensors take {position} bytes, the body has {body_size}"
        )
