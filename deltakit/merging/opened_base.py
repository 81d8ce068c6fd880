"""Opening the base of a merge: where it is, how it comes, and what it carries already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deltakit.errors import ConfigError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta import is_sdelta
from deltakit.hub.listing import listed
from deltakit.hub.location import Location, is_location
from deltakit.in_place.journal_record import merged_before
from deltakit.in_place.recovery import settle_base
from deltakit.merging.hub_base import HubBase
from deltakit.merging.inputs import Input
from deltakit.merging.naming import Output
from deltakit.merging.recorded_base import recorded_base


def opened_base(
    base: str | Path | Checkpoint | None, inputs: Sequence[Input], keep: bool, dry_run: bool
) -> tuple[Checkpoint, list[str]]:
    """The base, and notes on how it came to be as it is."""
    if isinstance(base, Checkpoint):
        return base, _carried(base)
    if base is None:
        found = recorded_base([(each.label, each.delta.base) for each in inputs])
        return HubBase(found.listing, keep=keep), list(found.notes)
    if is_location(base):
        return HubBase(listed(Location.parse(base)), keep=keep), []
    refuse_delta(base)
    settled = [] if dry_run else settle_base(Path(base))
    checkpoint = Checkpoint(base)
    return checkpoint, settled + _carried(checkpoint)


def comes_in_parts(base: Checkpoint, output: Output, keep: bool, whole: bool) -> bool:
    """Whether the weight files come to this machine one by one, while they are merged; where that
    cannot be (adapters and requantizing need the `whole` base), all of it is downloaded now."""
    if not isinstance(base, HubBase):
        return False
    if output.is_folder and not whole:
        return not base.is_whole
    if not keep:
        raise ConfigError(
            "a base on the Hub is let go of (--no-keep-base) by merges into a folder without "
            "adapters or requantizing only"
        )
    base.bring_all()
    return False


def refuse_delta(base: str | Path) -> None:
    """Raise ConfigError for a delta that stands where a base should."""
    if Path(base).is_file() and is_sdelta(base):
        raise ConfigError(f"{base} is a delta; the first argument of a merge is the base")


def _carried(base: Checkpoint) -> list[str]:
    """What the output takes over from merges into the base's own files."""
    merged = ", ".join(each.label for each in merged_before(base))
    return [f"{base.path} carries {merged}, merged in place; the output does too"] if merged else []
