"""A file on the Hub of which only some bytes are wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deltakit.errors import HubError
from deltakit.hub.choice import delta_file
from deltakit.hub.fetch import read_range
from deltakit.hub.listing import Listing, listed
from deltakit.hub.location import Location

PREFIX = 2**16  # bytes asked for at first; most headers are smaller


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """The file called `name` of a repository at one commit."""

    listing: Listing
    name: str

    @property
    def location(self) -> Location:
        """Where it is, at the very commit."""
        return self.listing.pinned(self.name)

    @property
    def file(self) -> Path:
        """Where the cache keeps it, if it does."""
        return self.listing.folder / self.name

    @property
    def is_cached(self) -> bool:
        """Whether it was downloaded before."""
        return self.file.is_file()

    @property
    def size(self) -> int:
        """Bytes of the whole file, as the Hub tells."""
        size = self.listing.files[self.name].size
        if size is None:
            raise HubError(f"{self.location}: the Hub does not tell the size of this file")
        return size

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), by one request; fewer at the end of the file."""
        return read_range(self.listing, self.name, start, stop)

    def head(self, size_of: Callable[[bytes], int]) -> bytes:
        """The beginning of the file, whose size its first bytes tell; two requests at most."""
        prefix = self.read(0, PREFIX)
        size = size_of(prefix)
        return prefix[:size] + (self.read(len(prefix), size) if size > len(prefix) else b"")


def remote_delta(location: Location) -> RemoteFile:
    """The delta that a location means; raises as `deltakit.hub.locate.local_delta` does."""
    listing = listed(location)
    return RemoteFile(listing, delta_file(listing))
