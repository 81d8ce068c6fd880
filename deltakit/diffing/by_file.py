"""Diffs in shares: those of the jobs of a job array, and one after the other of sides on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deltakit.delta import SparseDelta
from deltakit.diffing.checkpoint_entries import Sides
from deltakit.diffing.fill import (
    Collected,
    Known,
    Progress,
    Wanted,
    add_entries,
    add_extras,
    differing,
    finish,
)
from deltakit.diffing.part_files import part_record
from deltakit.diffing.parts import PartedDiff
from deltakit.diffing.report import DiffReport, report_of
from deltakit.errors import MissingFileError
from deltakit.formats.finished_mark import clear_marks
from deltakit.formats.sdelta import SdeltaFile
from deltakit.shares import Shard, ShareReport
from deltakit.streaming import all_at_hand, cut, in_file_order


def diff_share(
    out: Path,
    sides: Sides,
    wanted: Wanted,
    shard: Shard,
    force: bool,
    workers: int | None,
    progress: Progress | None,
) -> DiffReport:
    """Write a job's part, unless it is there, and join all parts if none is missing."""
    sizes = {name: sides.numel(name) for name in sides.names}
    shares = cut(in_file_order(sides.names, sides.base, sides.tuned), sizes, shard.jobs)
    parted = PartedDiff(out, sides, wanted, shares)
    parted.refuse_other(force)
    done = parted.is_done(shard.number)
    if not done:
        with all_at_hand(shares[shard.number - 1], sides.base, sides.tuned):
            parted.write(shard.number, workers, progress)
    missing = parted.missing()
    joined = None if missing else parted.join()
    own = parted.paths[shard.number - 1]
    share = ShareReport(
        shard=str(shard),
        files=len(parted.paths),
        written=() if done else (own.name,),
        found=(own.name,) if done else (),
        missing=tuple(path.name for path in missing),
        published=joined is not None,
    )
    if joined is not None:
        return report_of(out, joined[0], sides, joined[1], wanted.mode, share)
    try:
        return _described(own, sides, share)
    except MissingFileError:  # joined by another job meanwhile
        return _described(out, sides, share)


def diff_by_file(
    out: Path | None, sides: Sides, wanted: Wanted, workers: int | None
) -> SparseDelta | DiffReport:
    """A diff of sides that are on the Hub, of which one weight file at a time is at hand."""
    shares = in_file_order(sides.names, sides.base, sides.tuned)
    if out is None:
        return _in_memory(sides, wanted, shares, workers)
    parted = PartedDiff(out, sides, wanted, shares)
    for number, share in enumerate(shares, 1):
        if not parted.is_done(number):
            with all_at_hand(share, sides.base, sides.tuned):
                parted.write(number, workers, None)
    joined = parted.join()
    if joined is None:
        return _described(out, sides, None)
    clear_marks(out)
    return report_of(out, joined[0], sides, joined[1], wanted.mode)


def _in_memory(
    sides: Sides, wanted: Wanted, shares: list[list[str]], workers: int | None
) -> SparseDelta:
    collected = Collected()

    def found() -> Iterator[Known]:
        for share in shares:
            with all_at_hand(share, sides.base, sides.tuned):
                yield from differing(sides, share, workers, None)
                add_extras(collected, sides, share)

    differ = add_entries(collected, found(), wanted)
    finish(collected, sides, wanted, differ)
    return collected.delta


def _described(path: Path, sides: Sides, share: ShareReport | None) -> DiffReport:
    """The report on a file that an earlier job, or another one, wrote."""
    with SdeltaFile(path) as file:
        lossy = file.provenance.get("lossy", {}).get("from", file.header.nnz)
        differ = int(part_record(file).get("differing", lossy))
        return report_of(path, file, sides, differ, file.provenance["mode"], share)
