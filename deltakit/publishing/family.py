"""The deltas of one repository: a run's best and last, and its checkpoints at smaller budgets."""

from __future__ import annotations

from dataclasses import replace

from deltakit.budget import parse_budget
from deltakit.errors import BudgetError, ConfigError, FormatError
from deltakit.hub.choice import DELTA, which
from deltakit.hub.listing import Listing
from deltakit.hub.remote_delta import RemoteFile
from deltakit.inspection import Inspection, inspect_remote

RECORDS = ("config.yaml", "metrics.json")  # of the run, beside its deltas


def deltas_in(listing: Listing) -> list[str]:
    """The .sdelta files in the folder that the location names, and below; HubError for none."""
    names = [name for name in listing.below() if name.endswith(DELTA)]
    if not names:
        raise listing.lack(f"no {DELTA} file")
    return names


def records_in(listing: Listing) -> list[str]:
    """The run's configuration and metrics, where they stand in the location's folder."""
    return [name for name in map(listing.join, RECORDS) if name in listing.files]


def member(listing: Listing, budget: int | str) -> str:
    """The path of the delta that has exactly `budget` entries, as its header says.

    budget: a count ("50k", 50000) or a share ("0.1%") of all weights of the delta's base.
    `budget-N.sdelta` and `delta.sdelta` go before others; headers are read by range requests.
    Raises BudgetError, which lists what there is, where no delta or several others have as many.
    """
    if listing.holds_file():
        raise ConfigError(
            f"{listing.location} names a file, and a budget chooses among several; give one of both"
        )
    names = deltas_in(listing)
    first = [listing.join(f"delta{DELTA}")]
    if not str(budget).strip().endswith("%"):
        first.insert(0, listing.join(f"budget-{parse_budget(budget)}{DELTA}"))
    usual = [name for name in first if name in names]
    seen: dict[str, Inspection | None] = {}
    for name in usual:
        seen[name] = _header(listing, name)
        if _has(seen[name], budget):
            return name
    seen |= {name: _header(listing, name) for name in names if name not in usual}
    found = [name for name in names if _has(seen[name], budget)]
    if len(found) > 1:
        raise which(listing, found)
    if not found:
        raise _none(listing, budget, {name: seen[name] for name in names})
    return found[0]


def _header(listing: Listing, name: str) -> Inspection | None:
    """What the header says; None for one that cannot be read, which is not the one meant."""
    try:
        return inspect_remote(RemoteFile(listing, name))
    except FormatError:
        return None


def _has(found: Inspection | None, budget: int | str) -> bool:
    if found is None:
        return False
    base = found.header.base
    total = None if base is None else base.total_weights
    return found.entries == parse_budget(budget, total)


def _none(listing: Listing, budget: int | str, seen: dict[str, Inspection | None]) -> Exception:
    if listing.away is not None:
        return listing.away
    counts = {name: found.entries for name, found in seen.items() if found is not None}
    there = [f"{n} ({counts[n]:,})" if n in counts else f"{n} (not readable)" for n in seen]
    told = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
    what = f"{listing.location} has no delta of exactly {_written(budget)} entries; there: {told}"
    if str(budget).strip().endswith("%"):
        return BudgetError(what)
    larger = [name for name, entries in counts.items() if entries > parse_budget(budget)]
    if not larger:
        return BudgetError(f"{what}; none is larger")
    nearest = replace(listing.location, path=min(larger, key=counts.__getitem__))
    return BudgetError(f"{what}; to make one: deltakit truncate {nearest} --budget {budget}")


def _written(budget: int | str) -> str:
    return f"{budget:,}" if isinstance(budget, int) else budget
