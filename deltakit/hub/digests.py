"""The digests that the Hub records of files: sha256 of large ones, git's sha1 of small ones."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from deltakit.hub.listing import Entry

_BLOCK = 2**20  # bytes hashed at a time


def digests(content: Path | bytes, entry: Entry) -> tuple[str, str] | None:
    """The digest of a file's content and the one that the Hub records, in hexadecimal.

    None where the Hub records none.
    """
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if entry.sha256 is not None:
        expected, found = entry.sha256, hashlib.sha256()
    elif entry.git_sha1 is not None:
        expected = entry.git_sha1
        found = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    else:
        return None
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as opened:
        while block := opened.read(_BLOCK):
            found.update(block)
    return found.hexdigest(), expected


def is_recorded(content: Path | bytes, entry: Entry | None) -> bool:
    """Whether the Hub has this very content; False where it has no such file or tells no digest."""
    compared = None if entry is None else digests(content, entry)
    return compared is not None and compared[0] == compared[1]
