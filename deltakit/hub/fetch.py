"""Bringing files of the Hub into the cache, each checked against the digest that the Hub records.

The client accepts a body of the right length whatever its bytes; what was just downloaded is
therefore hashed here, once, and removed where it is not what the Hub says. Files that were in the
cache before are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from deltakit.errors import ChecksumError
from deltakit.hub import cache
from deltakit.hub.digests import digests
from deltakit.hub.failures import explained, no_space, patiently
from deltakit.hub.listing import Entry, Listing


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
        entry = listing.files.get(name, Entry())
        if (entry.size or 0) > cache.room():
            raise no_space(place)
        with explained(place):
            file = Path(hf_hub_download(repo, name, revision=listing.commit))
        check_digest(file, entry, str(place))
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


def check_digest(file: Path, entry: Entry, what: str) -> None:
    """Raise ChecksumError where a file differs from the digest of `entry`, and remove it from the
    cache; one whose digest is not known passes."""
    compared = digests(file, entry)
    if compared is not None and compared[0] != compared[1]:
        cache.forget(file)
        raise ChecksumError(
            f"{what}: the bytes that came have the digest {compared[0][:16]}, the Hub records "
            f"{compared[1][:16]}; they were removed from the cache, run the same command again"
        )
