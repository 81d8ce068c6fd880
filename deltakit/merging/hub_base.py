"""A base on the Hub whose weight files come to this machine one by one, while they are merged.

Their headers are read by range requests first, so that what a merge will write, and what of it
cannot fit, is known before anything large is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deltakit.formats import safetensors_header
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.checkpoint_files import Located, read_index
from deltakit.formats.safetensors_file import SafetensorsFile
from deltakit.hub import cache
from deltakit.hub.choice import INDEX, description_files, weight_files
from deltakit.hub.fetch import fetch
from deltakit.hub.listing import Listing
from deltakit.hub.locate import named_after
from deltakit.hub.remote_delta import RemoteFile


class HubBase(Checkpoint):
    """The checkpoint that a listing's location means, with all but its weights on this machine.

    keep: whether weight files that were downloaded stay in the cache; those that were there before
    do. Elements can be read of files that are at hand (`at_hand`, `bring_all`). Raises HubError,
    ChecksumError, FormatError and OutputError.
    """

    def __init__(self, listing: Listing, *, keep: bool = True) -> None:
        location = listing.location
        names = weight_files(listing, lambda name: (fetch(listing, [name]) / name).read_bytes())
        folder = fetch(listing, description_files(listing))
        index = folder / names.pop(0) if names[0].endswith(INDEX) else None
        directory = None if listing.holds_file() and index is None else (folder / names[0]).parent
        self._listing, self._keep = listing, keep
        self._names = {Path(name).name: name for name in names}
        self.path = folder / location.path
        self.model_id, self.revision = location.repo, listing.commit
        located = Located(
            directory,
            tuple(folder / name for name in names),
            None if index is None else read_index(index),
            index,
        )
        self._open(located, {file: _shard(listing, name) for file, name in self._names.items()})
        self.named_after = named_after(str(location))

    def __str__(self) -> str:
        """Its location at the very commit."""
        return str(self._listing.pinned(self._listing.location.path))

    @property
    def is_whole(self) -> bool:
        """Whether all weight files are on this machine."""
        return all(file.is_file() for file in self.files)

    def bring_all(self) -> None:
        """Download the weight files that are not on this machine."""
        fetch(self._listing, self._names.values())

    def version(self) -> str:
        """The repository and the commit."""
        return f"{self.model_id}@{self.revision}"

    @contextmanager
    def at_hand(self, file: str) -> Iterator[None]:
        """Download a weight file if need be, and let go of it afterwards as `keep` says."""
        name = self._names[file]
        entry, place = self._listing.files[name], self._listing.folder / name
        digest = entry.sha256 or entry.git_sha1
        held = place.is_file() or cache.holds(self._listing.location.repo, digest)
        try:
            fetch(self._listing, [name])
            yield
        finally:
            if not (held or self._keep):
                self.shards[file].release()
                with suppress(FileNotFoundError):  # it did not come
                    cache.forget(place)


class _RemoteShard(SafetensorsFile):
    """A weight file that is still far away: its header, and the place that it will come to."""

    def __init__(self, file: RemoteFile) -> None:
        self._where, self._size = str(file.location), file.size
        self._head = file.head(
            lambda prefix: safetensors_header.header_size(prefix, self._size, self._where)
        )
        super().__init__(file.file)

    def head(self) -> bytes:
        return self._head

    def _read_header(self) -> safetensors_header.Header:
        return safetensors_header.parse(self._head, self._size, self._where)


def _shard(listing: Listing, name: str) -> SafetensorsFile:
    file = RemoteFile(listing, name)
    return SafetensorsFile(file.file) if file.is_cached else _RemoteShard(file)
