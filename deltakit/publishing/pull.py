"""Getting deltas from the Hub, each whole and sound before it appears at its place."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltakit.budget import parse_budget
from deltakit.delta import SparseDelta
from deltakit.errors import (
    ChecksumError,
    ConfigError,
    FormatError,
    MissingFileError,
    OutputExistsError,
    UnsupportedVersionError,
)
from deltakit.formats.atomic import refuse_existing, replacing
from deltakit.formats.atomic_folder import replacing_folder
from deltakit.formats.sdelta import SdeltaFile, load
from deltakit.hub import cache
from deltakit.hub.choice import DELTA, delta_file
from deltakit.hub.digests import is_recorded
from deltakit.hub.fetch import fetch
from deltakit.hub.listing import Listing, listed
from deltakit.hub.locate import named_after
from deltakit.hub.location import Location, is_location
from deltakit.merging.output import check_space
from deltakit.publishing.family import deltas_in, member, records_in
from deltakit.verification import verify

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PulledFile:
    """One file: its path in the repository, where it is now, its size in bytes, and the entries of
    a delta (None for a configuration or metrics)."""

    name: str
    path: str
    bytes: int
    entries: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PullReport:
    """What was got.

    repo, commit: where it came from. output: the file or folder written. files: all of them.
    base_id, base_revision: what the deltas record about their base; None where they record nothing.
    """

    repo: str
    commit: str
    output: str
    files: tuple[PulledFile, ...]
    base_id: str | None
    base_revision: str | None

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {**asdict(self), "files": [asdict(file) for file in self.files]}


def pull(
    repo: str,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    budget: int | str | None = None,
    family: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PullReport:
    """Get a delta from the Hub into a file of its own, every byte of it checked.

    repo: "owner/name" or `hf://owner/name[@revision][/file or folder]`. out: a file, or a folder
    that exists; by default a file in the working directory named after the repository, the file or
    the budget. revision: a branch, tag or commit. budget: get the delta that has exactly so many
    entries (see `deltakit.publishing.family.member`). family: get all deltas with config.yaml and
    metrics.json, into a folder. force: replace files that exist. progress: called with (entries
    checked, entries in all) of each delta.

    Nothing appears at its place before all of it was read and compared with its own digests; a file
    that differs is removed from the cache. Raises HubError and its children, ChecksumError,
    BudgetError, ConfigError, OutputExistsError and OutputError.
    """
    location = located(repo, revision)
    if family and budget is not None:
        raise ConfigError("a budget chooses one delta of a family; give it or family (--all)")
    target = _target(location, out, budget, family)
    _refuse(target, force, folder=family)
    listing = listed(location)
    if family:
        if listing.holds_file():
            raise ConfigError(
                f"{location} names a file; give its repository or folder for all of it"
            )
        names = [*deltas_in(listing), *records_in(listing)]
        if listing.away is not None:
            _log.warning("%s: only what the cache holds is pulled, perhaps not all of it", location)
        places = {name: target / _below(location, name) for name in names}
    else:
        places = {chosen(listing, budget): target}
    folder = fetch(listing, places)
    check_space(target, sum((folder / name).stat().st_size for name in places))
    with _folder(target if family else None) as made:
        written = {
            name: place if made is None else made / place.relative_to(target)
            for name, place in places.items()
        }
        for name, place in written.items():
            if family:
                place.parent.mkdir(parents=True, exist_ok=True)
            _copy(listing, name, place, progress)
    return _report(listing, target, places)


def read(repo: str, *, revision: str | None, budget: int | str | None) -> SparseDelta:
    """The delta that `pull` gets, read from the cache; see `SparseDelta.from_hub`."""
    listing = listed(located(repo, revision))
    name = chosen(listing, budget)
    file = fetch(listing, [name]) / name
    with _explaining(listing, name, file):
        return load(file)


def located(repo: str, revision: str | None) -> Location:
    """The location that "owner/name" or `hf://...` means; ConfigError for two revisions."""
    location = Location.parse(repo if is_location(repo) else f"hf://{repo}")
    if None not in (location.revision, revision) and location.revision != revision:
        raise ConfigError(f"{location} names a revision, and revision is {revision}; give one")
    pinned = Location(location.repo, location.revision or revision, location.path)
    return Location.parse(str(pinned))  # a revision becomes a path as well


def chosen(listing: Listing, budget: int | str | None) -> str:
    """The path of the delta that is meant: by its budget, its name, or the usual one."""
    if budget is not None:
        return member(listing, budget)
    name = delta_file(listing)
    if not name.endswith(DELTA):
        raise ConfigError(f"{listing.location} is no {DELTA} file, and pull gets deltas only")
    return name


def _target(
    location: Location, out: str | Path | None, budget: int | str | None, family: bool
) -> Path:
    if is_location(out):
        raise ConfigError(f"{out} is on the Hub; a pull writes to a local path")
    default = named_after(str(location), "" if family else DELTA)
    if budget is not None:
        default = default.with_name(f"{default.stem}-{_plain(budget)}{DELTA}")
    if out is None:
        return default
    path = Path(out)
    return path / default.name if path.is_dir() and not family else path


def _plain(budget: int | str) -> str:
    """A budget as part of a file's name: 50k as 50000, 0.1% as it is."""
    text = str(budget).strip()
    return text if text.endswith("%") else str(parse_budget(budget))


def _refuse(target: Path, force: bool, *, folder: bool) -> None:
    if not target.parent.is_dir():
        raise MissingFileError(f"cannot write {target}: folder {target.parent} does not exist")
    refuse_existing(target, force)
    if target.exists() and target.is_dir() != folder:
        kind = "folder" if target.is_dir() else "file"
        raise OutputExistsError(f"{target} exists and is a {kind}; give another output")


def _below(location: Location, name: str) -> Path:
    """The path of a file relative to the location's folder; never one that leads out of it."""
    path = name.removeprefix(f"{location.path}/") if location.path else name
    if "\\" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise FormatError(f"{location} lists a file {name!r}, which is no plain path")
    return Path(path)


@contextmanager
def _folder(target: Path | None) -> Iterator[Path | None]:
    """Where the files of a family are written to: its folder where that exists, else a new one
    that is moved there when all are written. None for a lone file."""
    if target is None or target.is_dir():
        yield target
        return
    with replacing_folder(target) as temporary:
        yield temporary


def _copy(
    listing: Listing, name: str, place: Path, progress: Callable[[int, int], None] | None
) -> None:
    with replacing(place) as temporary:
        shutil.copyfile(listing.folder / name, temporary)
        if not name.endswith(DELTA):
            return
        with _explaining(listing, name, temporary):
            with SdeltaFile(temporary):
                problems = verify(temporary, progress=progress).problems
            if problems:
                raise FormatError(problems[0])


@contextmanager
def _explaining(listing: Listing, name: str, read: Path) -> Iterator[None]:
    """Tell what is wrong with a delta, `read` from the cache or a copy, as of its location; one that is
    damaged is removed from the cache."""
    place = listing.pinned(name)
    try:
        yield
    except UnsupportedVersionError as error:
        raise UnsupportedVersionError(str(error).replace(str(read), str(place))) from None
    except FormatError as error:
        file = listing.folder / name
        why = "it was removed from the cache, run the same command again"
        if is_recorded(file, listing.files[name]):
            why = f"the Hub records these very bytes, so tell the owner of {place.repo}"
        cache.forget(file)
        problem = str(error).replace(str(read), str(place))
        raise ChecksumError(f"{problem}; {why}") from None


def _report(listing: Listing, target: Path, places: dict[str, Path]) -> PullReport:
    files, bases = [], []
    for name, place in places.items():
        entries = None
        if name.endswith(DELTA):
            with SdeltaFile(place) as opened:
                entries = opened.header.nnz
                bases.append(opened.base)
        size = place.stat().st_size
        files.append(PulledFile(name=name, path=str(place), bytes=size, entries=entries))
    base = bases[0]
    return PullReport(
        repo=listing.location.repo,
        commit=listing.commit,
        output=str(target),
        files=tuple(files),
        base_id=None if base is None else base.model_id,
        base_revision=None if base is None else base.revision,
    )
