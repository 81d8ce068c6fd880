"""Bringing files of the Hub into the cache, each checked against the digest that the Hub records.

The client accepts a body of the right length whatever its bytes; what was just downloaded is
therefore hashed here, once, and removed where it is not what the Hub says. Files that were in the
cache before are taken as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from deltakit.errors import ChecksumError
from deltakit.hub import cache
from deltakit.hub.failures import explained, patiently
from deltakit.hub.listing import Entry, Listing

_BLOCK = 2**20  # bytes hashed at a time


def fetch(listing: Listing, names: Iterable[str]) -> Path:
    """Download the files that the cache lacks; returns the folder in which all of them stand.

    Raises HubError (and its children), ChecksumError for bytes other than the Hub's, and
    OutputError where they cannot be kept.
    """
    from huggingface_hub import hf_hub_download

    repo = listing.location.repo
    for name in names:
        if (listing.folder / name).is_file():
            continue
        if listing.away is not None:
            raise listing.away
        place = listing.pinned(name)
        with explained(place):
            file = Path(hf_hub_download(repo, name, revision=listing.commit))
        _check(file, listing.files.get(name, Entry()), str(place))
    if listing.away is None:
        with suppress(OSError):  # a cache that is only read serves as well
            cache.remember(repo, listing.location.revision, listing.commit)
    return listing.folder


def read_range(listing: Listing, name: str, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file, or as many as there are, without downloading the rest."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported, but lazily
        build_hf_headers,
        hf_raise_for_status,
    )

    url = hf_hub_url(listing.location.repo, name, revision=listing.commit)

    def ask() -> bytes:
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
        response = get_session().get(url, headers=headers)
        hf_raise_for_status(response)
        body: bytes = response.content
        return body if response.status_code == 206 else body[start:stop]

    with explained(listing.pinned(name)):
        return patiently(ask)


def _check(file: Path, entry: Entry, what: str) -> None:
    if entry.sha256 is not None:
        expected, found = entry.sha256, hashlib.sha256()
    elif entry.git_sha1 is not None:
        expected = entry.git_sha1
        found = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    else:
        return
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            found.update(block)
    if found.hexdigest() != expected:
        cache.forget(file)
        raise ChecksumError(
            f"{what}: the bytes that came have the digest {found.hexdigest()[:16]}, the Hub records "
            f"{expected[:16]}; they were removed from the cache, run the same command again"
        )
