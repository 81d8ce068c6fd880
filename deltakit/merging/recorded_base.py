"""The base of deltas by what they record about it: a repository of the Hub and its commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltakit.delta import BaseIdentity
from deltakit.errors import BaseMismatchError, ConfigError, HubError, HubNotFoundError
from deltakit.hub.listing import Listing, cached_listing, head_commit, listed
from deltakit.hub.location import Location

Labelled = tuple[str, BaseIdentity | None]  # what messages call a delta, and what it records
MERGE = "deltakit merge {base} DELTA"


@dataclass(frozen=True, slots=True)
class RecordedBase:
    """Where the base of deltas is on the Hub, at the commit they record, and notes for the user."""

    listing: Listing
    notes: tuple[str, ...]


def recorded_base(deltas: Sequence[Labelled], command: str = MERGE) -> RecordedBase:
    """The base that all `deltas` name; only what it holds is asked for, nothing large downloaded.

    command: the command line in which messages put a base. Without a recorded revision the head of the default branch is taken. A commit that the Hub no
    longer has is taken from the cache, if it is there. Raises ConfigError where a delta records no
    repository of the Hub, BaseMismatchError where they record different ones, HubNotFoundError for
    a repository or commit that is gone, and HubError for what cannot be had.
    """
    label, location = _agreed(deltas, "write: " + command.format(base="BASE"))
    notes = []
    try:
        listing = listed(location)
    except HubNotFoundError as error:
        cached = cached_listing(location, error)
        if cached is None:
            raise HubNotFoundError(_gone(label, location, error, command)) from None
        listing = cached
        notes.append(f"{location} is no longer on the Hub; the copy in the cache is used")
    except HubError as error:
        raise type(error)(f"no base given, and that of {label} cannot be had: {error}") from None
    found = f"the base is {listing.pinned('')}"
    if location.revision is None:
        return RecordedBase(listing, (f"{found}, the newest, as {label} records no revision",))
    head = head_commit(location.repo) if listing.away is None else listing.commit
    if head not in (None, listing.commit):
        notes.append(
            f"{location.repo} has moved on to {head} since {label} was made; its own base is taken"
        )
    return RecordedBase(listing, (f"{found}, as {label} records", *notes))


def _agreed(deltas: Sequence[Labelled], give: str) -> tuple[str, Location]:
    """The location that the deltas record, and which of them records it."""
    found = [(label, _location(label, identity, give)) for label, identity in deltas]
    label, first = next((each for each in found if each[1].revision is not None), found[0])
    for other, location in found:
        if location.repo != first.repo or location.revision not in (None, first.revision):
            raise BaseMismatchError(
                f"no base given, and {label} was made for {first}, {other} for {location}; if one "
                f"base fits both, {give}"
            )
    return label, first


def _location(label: str, identity: BaseIdentity | None, give: str) -> Location:
    name = None if identity is None else identity.model_id
    if identity is None or name is None:
        raise ConfigError(f"no base given, and {label} records none; {give}")
    try:
        location = Location.parse(f"hf://{name}")
        if (location.repo, location.path) != (name, ""):
            raise ConfigError(name)
        return Location.parse(str(Location(name, identity.revision)))
    except ConfigError:
        raise ConfigError(
            f"no base given ({label} was made for {name}, which is no repository of the Hub); {give}"
        ) from None


def _gone(label: str, location: Location, error: HubNotFoundError, command: str) -> str:
    if location.revision is None or head_commit(location.repo) is None:
        return f"no base given, and that of {label} cannot be had: {error}"
    return (
        f"{label} was made for {location}, a revision that the Hub no longer has; give a copy of that "
        f"base as BASE, or try the present one, whose values are compared first: "
        f"{command.format(base=Location(location.repo))}"
    )
