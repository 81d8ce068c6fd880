"""The one place where a path given by the user becomes a local one, downloaded if it is `hf://`.

Local paths pass untouched and cost nothing: huggingface_hub is imported for locations only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from deltakit.errors import ConfigError
from deltakit.hub.cache import COMMIT
from deltakit.hub.location import Location, is_location

Given = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class LocalBase:
    """A base on this machine, with the Hub's id of it and the commit, where it came from there."""

    path: Path
    model_id: str | None = None
    revision: str | None = None


def local_delta(given: Given) -> Path:
    """The local file of a delta.

    Of a location: the file that it names, `delta.sdelta`, or the only .sdelta file there. Raises
    ConfigError where that is not clear, and HubError, ChecksumError or OutputError where it cannot
    be downloaded.
    """
    if not is_location(given):
        return Path(given)
    location = Location.parse(given)
    known = _pinned_and_cached(location)
    if known is not None:
        return known
    from deltakit.hub.choice import delta_file
    from deltakit.hub.fetch import fetch
    from deltakit.hub.listing import listed

    listing = listed(location)
    name = delta_file(listing)
    return fetch(listing, [name]) / name


def local_source(given: Given) -> Path:
    """The local file or folder of a delta or adapter of whatever format.

    Of a location: see `deltakit.hub.choice.foreign_files`. Raises as `local_delta` does.
    """
    if not is_location(given):
        return Path(given)
    from deltakit.hub.choice import DELTA, foreign_files
    from deltakit.hub.fetch import fetch
    from deltakit.hub.listing import listed

    location = Location.parse(given)
    listing = listed(location)
    names = foreign_files(listing, lambda name: (fetch(listing, [name]) / name).read_bytes())
    folder = fetch(listing, names)
    return folder / (names[0] if names[0].endswith(DELTA) else location.path)


def local_base(given: Given) -> LocalBase:
    """The local file or folder of a base: its safetensors, configuration and tokenizer alone.

    Raises as `local_delta` does.
    """
    return base_at(Location.parse(given)) if is_location(given) else LocalBase(Path(given))


def base_at(location: Location) -> LocalBase:
    """`local_base` of a location."""
    from deltakit.hub.choice import description_files, weight_files
    from deltakit.hub.fetch import fetch
    from deltakit.hub.listing import listed

    listing = listed(location)
    weights = weight_files(listing, lambda name: (fetch(listing, [name]) / name).read_bytes())
    folder = fetch(listing, [*description_files(listing), *weights])
    return LocalBase(folder / location.path, location.repo, listing.commit)


def description_at(location: Location) -> LocalBase:
    """The local folder of a base with its configuration and tokenizer, without its weights."""
    from deltakit.hub.choice import description_files
    from deltakit.hub.fetch import fetch
    from deltakit.hub.listing import listed

    listing = listed(location)
    folder = fetch(listing, description_files(listing))
    return LocalBase(folder / location.path, location.repo, listing.commit)


def stands_for_delta(given: Given) -> bool:
    """Whether a location is that of a delta, told by the names of the files there."""
    from deltakit.hub.choice import is_delta
    from deltakit.hub.listing import listed

    return is_delta(listed(Location.parse(given)))


def named_after(given: Given, suffix: str = "") -> Path:
    """The path that outputs made of something are named after and stand beside.

    A local path itself; of a location, in the working directory, its last part (of an index file its
    folder's), with `suffix` where that names no delta and no weights.
    """
    if not is_location(given):
        return Path(given)
    location = Location.parse(given)
    if location.path.endswith(".json"):
        location = replace(location, path=location.path.rpartition("/")[0])
    named = location.name.endswith((".sdelta", ".safetensors"))
    return Path(location.name if named else location.name + suffix)


def label_of(given: Given) -> str:
    """What messages and reports call a path or a location."""
    return str(Location.parse(given)) if is_location(given) else str(Path(given))


def refuse_location(given: Given) -> None:
    """Raise ConfigError for a location where files are going to be changed."""
    if is_location(given):
        location = Location.parse(given)
        raise ConfigError(
            f"{location} is on the Hub, and files in the cache are not changed in place, as others "
            "read them too; merge into a new folder, or get a copy of your own first "
            f"(hf download {location.repo} --local-dir DIR)"
        )


def _pinned_and_cached(location: Location) -> Path | None:
    """The file of a location that names one at a commit, if it is here: then nothing is asked."""
    if not location.path or not COMMIT.fullmatch(location.revision or ""):
        return None
    from deltakit.hub.cache import snapshot

    file = snapshot(location.repo, location.revision or "") / location.path
    return file if file.is_file() else None
