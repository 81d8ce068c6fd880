"""What a repository holds at a revision: one request, or the cache when the Hub is away."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deltakit.errors import (
    DeltakitError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
    nearest,
)
from deltakit.hub import cache
from deltakit.hub.failures import explained, offline, patiently
from deltakit.hub.location import Location

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One file: its size in bytes and its digests in hexadecimal, where they are known.

    sha256: of a large file's bytes. git_sha1: of a small one's, as git computes it for blobs.
    """

    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of `location`'s repository at one commit, by path.

    away: why only the cache was asked, and so perhaps not all files are listed; None if all are.
    """

    location: Location
    commit: str
    files: Mapping[str, Entry]
    away: DeltakitError | None = None

    @property
    def folder(self) -> Path:
        """Where the files are once they are downloaded."""
        return cache.snapshot(self.location.repo, self.commit)

    def pinned(self, path: str) -> Location:
        """The location of a file at this very commit."""
        return replace(self.location, revision=self.commit, path=path)

    def join(self, name: str) -> str:
        """The path of `name` in the folder that the location names."""
        return f"{self.location.path}/{name}" if self.location.path else name

    def holds_file(self) -> bool:
        """Whether the location names a file, not a folder."""
        return self.location.path in self.files

    def below(self) -> list[str]:
        """The files in the folder that the location names, also in its sub-folders, in order.

        Raises HubNotFoundError when there are none.
        """
        under = f"{self.location.path}/" if self.location.path else ""
        found = sorted((name for name in self.files if name.startswith(under)), key=str.encode)
        if not found and under:
            hint = nearest(self.location.path, list(self.files))
            raise self.lack(f"no file or folder {self.location.path!r}{hint}")
        return found

    def lack(self, what: str) -> DeltakitError:
        """The error for something that should be there: `what` says what is."""
        return self.away or HubNotFoundError(f"{self.location}: {self.location.repo} has {what}")


def listed(location: Location) -> Listing:
    """All files of the location's repository, at the commit that its revision means now.

    Without a network, or with the Hub in trouble, what the cache holds of that revision is listed
    and a warning is logged; with HF_HUB_OFFLINE nothing else is tried. Raises HubError.
    """
    from huggingface_hub import HfApi, constants

    known = cache.known_commit(location.repo, location.revision)
    if constants.HF_HUB_OFFLINE:
        if known is None:
            raise offline(location)
        return _from_cache(location, known, offline(location, "some file of it"))
    try:
        with explained(location):
            api = HfApi()
            info = patiently(
                lambda: api.model_info(
                    location.repo, revision=location.revision, files_metadata=True
                ),
                None if known is None else (),
            )
    except HubUnavailableError as error:
        if known is None:
            raise
        _log.warning("%s; meanwhile commit %s from the cache is used", error, known[:12])
        return _from_cache(location, known, error)
    return listing_of(location, info)


def listing_of(location: Location, info: ModelInfo) -> Listing:
    """The listing that the client's answer about a revision holds (files_metadata=True)."""
    files = {
        each.rfilename: Entry(
            size=each.size,
            sha256=None if each.lfs is None else each.lfs.sha256,
            git_sha1=each.blob_id if each.lfs is None else None,
        )
        for each in info.siblings or []
    }
    return Listing(location, info.sha or "", files)


def cached_listing(location: Location, why: DeltakitError) -> Listing | None:
    """What the cache holds of the location's revision, None where that is nothing.

    why: the reason that only the cache is asked, as `Listing.away`.
    """
    known = cache.known_commit(location.repo, location.revision)
    return None if known is None else _from_cache(location, known, why)


def head_commit(repo: str) -> str | None:
    """The newest commit of a repository's default branch; None where the Hub does not tell."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    with suppress(HubError), explained(Location(repo)):
        return HfApi().model_info(repo).sha
    return None


def _from_cache(location: Location, commit: str, why: DeltakitError) -> Listing:
    folder = cache.snapshot(location.repo, commit)
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return Listing(location, commit, dict.fromkeys(names, Entry()), why)
