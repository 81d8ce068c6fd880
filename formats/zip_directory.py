"""The records of a zip archive that stores its content as it is, by offset and size.

Such an archive is what torch.save writes, always with the fields of zip64 (APPNOTE 6.3.10, 4.3). It
is judged by its own directory alone; checksums are not compared, as torch may be told to leave them
out.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from deltakit.errors import FormatError

Bytes = bytes | memoryview
_END, _END64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q")
_LOCATOR, _LOCAL = struct.Struct("<4sIQI"), struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_MOST = 4096  # records; one tensor has fewer than ten
_FULL32, _FULL16 = 2**32 - 1, 2**16 - 1


@dataclass(frozen=True, slots=True)
class Stored:
    """Where the content of a record stands, in bytes from the start of the archive."""

    offset: int
    size: int


def read(archive: Bytes, what: str) -> Mapping[str, Stored]:
    """Name -> place of every record of a whole archive, given as bytes or as a mapping of them.

    what: names it in messages. Raises FormatError for what is no such archive, is truncated, holds
    compressed or encrypted records, two of one name, or ones that reach beyond its bounds.
    """
    try:
        start, size, count = _directory(archive)
        if count > _MOST or start + size > len(archive):
            raise ValueError("its directory is beyond its end")
        entries = memoryview(archive)[start : start + size]
        found: dict[str, Stored] = {}
        at = 0
        for _ in range(count):
            name, place, at = _record(archive, entries, at, start)
            if name in found:
                raise ValueError(f"record {name!r} stands twice")
            found[name] = place
        if at != size:
            raise ValueError("its directory is longer than its records")
    except (ValueError, struct.error) as error:
        raise FormatError(
            f"{what}: no zip archive of torch.save, or a broken one: {error}"
        ) from None
    return found


def _directory(archive: Bytes) -> tuple[int, int, int]:
    """Offset and size of the directory, and how many records it lists."""
    end = len(archive) - _END.size
    if end < 0:
        raise ValueError(f"{len(archive)} bytes are too few")
    mark, disk, _, _, count, size, start, comment = _END.unpack_from(archive, end)
    if mark != b"PK\5\6" or comment:
        raise ValueError("it does not end as one")
    before = end - _LOCATOR.size
    if before >= 0:
        mark, disk64, end64, _ = _LOCATOR.unpack_from(archive, before)
        if mark == b"PK\6\7":
            mark, _, _, _, disk, _, _, count, size, start = _END64.unpack_from(archive, end64)
            disk |= disk64
            if mark != b"PK\6\6":
                raise ValueError("its zip64 end is missing")
    if disk:
        raise ValueError("it is in several parts")
    return start, size, count


def _record(archive: Bytes, entries: memoryview, at: int, limit: int) -> tuple[str, Stored, int]:
    """Name and place of the record that is listed at `at`, and where the next one is listed."""
    fields = _ENTRY.unpack_from(entries, at)
    mark, flags, method = fields[0], fields[3], fields[4]
    packed, size, name_size, extra_size, comment_size = fields[8:13]
    local = fields[16]
    at += _ENTRY.size
    end = at + name_size + extra_size + comment_size
    if mark != b"PK\1\2" or end > len(entries):
        raise ValueError("its directory is broken")
    name = bytes(entries[at : at + name_size]).decode()
    extra = bytes(entries[at + name_size : at + name_size + extra_size])
    size, packed, local = _wide(extra, size, packed, local)
    if flags & 1 or method or packed != size:
        raise ValueError(f"record {name!r} is compressed or encrypted, which torch.save never does")
    head = _LOCAL.unpack_from(archive, local)
    offset = local + _LOCAL.size + head[9] + head[10]
    if head[0] != b"PK\3\4" or offset + size > limit:
        raise ValueError(f"record {name!r} is not where its directory says")
    return name, Stored(offset, size), end


def _wide(extra: bytes, *narrow: int) -> list[int]:
    """Sizes and offset with those that need 64 bits taken from the zip64 field of a record."""
    at, wide = 0, b""
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + size]
        at += 4 + size
    found = []
    for value in narrow:
        if value == _FULL32:
            (value,), wide = struct.unpack("<Q", wide[:8]), wide[8:]
        found.append(value)
    return found
