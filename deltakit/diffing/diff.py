"""The exact sparse difference of two checkpoints.

An entry is every element whose bits differ; there is no threshold, and signed zeros and NaN
payloads count. Merging the result into the base gives the tuned tensors back, byte for byte,
unless a budget asks for the largest changes only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from deltakit.budget import parse_budget
from deltakit.delta import Mode, SparseDelta
from deltakit.diffing.by_file import diff_by_file, diff_share
from deltakit.diffing.checkpoint_entries import Sides, match
from deltakit.diffing.fill import Collected, Progress, Wanted, differing, fill
from deltakit.diffing.report import DiffReport, report_of
from deltakit.errors import BudgetError, ConfigError, OutputError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta_stream import sdelta_stream
from deltakit.shares import Shard
from deltakit.streaming import comes_by_file, streamed

if TYPE_CHECKING:
    from deltakit.patching.states import State

Given = str | os.PathLike[str] | Checkpoint
Missing = Literal["error", "ignore"]


@overload
def diff(
    base: Given,
    tuned: Given,
    *,
    mode: Mode = ...,
    keep_base: bool = ...,
    missing: Missing = ...,
    budget: int | str | None = ...,
    density: float | None = ...,
    out: None = None,
    progress: Progress | None = ...,
    workers: int | None = ...,
    keep_downloads: bool = ...,
) -> SparseDelta: ...


@overload
def diff(
    base: Given,
    tuned: Given,
    *,
    mode: Mode = ...,
    keep_base: bool = ...,
    missing: Missing = ...,
    budget: int | str | None = ...,
    density: float | None = ...,
    out: str | os.PathLike[str],
    progress: Progress | None = ...,
    workers: int | None = ...,
    shard: Shard | str | tuple[int, int] | None = ...,
    force: bool = ...,
    keep_downloads: bool = ...,
) -> DiffReport: ...


@overload
def diff(
    base: State,
    tuned: State,
    *,
    keep_base: bool = ...,
    step: int | None = ...,
    names: Mapping[str, str] | None = ...,
) -> SparseDelta: ...


def diff(
    base: Given | State,
    tuned: Given | State,
    *,
    mode: Mode = "set",
    keep_base: bool = True,
    missing: Missing = "error",
    budget: int | str | None = None,
    density: float | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
    shard: Shard | str | tuple[int, int] | None = None,
    force: bool = True,
    keep_downloads: bool = True,
    step: int | None = None,
    names: Mapping[str, str] | None = None,
) -> SparseDelta | DiffReport:
    """The delta that turns `base` into `tuned`; both are files or folders, sharded as they like.

    Either may also be a live module or state dict, for which keep_base, step and names alone apply:
    see `deltakit.patching.stream.diff_states`; step makes the delta the patch step -> step + 1.

    mode: "set" stores the tuned bits; "add" stores differences where base + v gives the tuned bits
    back, entry for entry, and falls back to "set" for every tensor where it does not.
    keep_base: whether set tensors keep the base's bits beside, which weights, stacking and
    truncation by magnitude need. missing: what to do about tensors that only the base has.
    budget: keep only so many entries, those with the largest |change| (as `truncate` chooses them):
    a count ("100k") or a share of all weights of the base ("0.1%"); density: the same share as a
    number in [0, 1]. Provenance says "lossy" where entries were dropped.
    out: write the delta to this file, a tensor at a time, and return a DiffReport; a file that is
    there is replaced. progress: called with (elements done, elements in all). workers: threads that
    compare, a tensor each; one by default.

    shard: (i, n) or "i/n" makes this job i of n, counted from 1, of a job array. The jobs run in any
    order, together or not, on machines that share a file system. Each compares its own share of the
    tensors (whole weight files of the base where these are at least n) and writes them to a part beside
    `out`, itself an .sdelta file; the one that finishes last joins the parts into `out`, byte for byte
    what one diff writes, and removes them. A job that is run again does what is missing, and one with
    other inputs or options replaces parts that are not its own. With a budget each part keeps as many
    entries, so that those of the whole are among them. force: replace an `out` that is not of these
    jobs. The report is of the part, or of `out` where this job joined it.

    Sides on the Hub (`hf://owner/repo[@revision][/file]`) come one weight file of the base (and those of the
    tuned side with the same tensors) at a time, in as many parts, so that a diff that ends early goes on
    where it stopped. keep_downloads: whether weight files that came for this stay in the cache.

    Tensors that only `tuned` has become extras, rows that were appended to a tensor become extras
    called `name[rows:]` (see `deltakit.diffing.grown_rows`), and the changes of config.json come with them.
    Memory is O(entries + chunk); with `out` it is O(entries of one tensor + budget + chunk).
    Raises CoordinateError for tensors that `tuned` lacks or has in another shape, DeltaError for
    another dtype, BudgetError for a budget or density that cannot be.
    """
    if mode not in ("add", "set") or missing not in ("error", "ignore"):
        raise ConfigError(
            f"mode {mode!r} and missing {missing!r}: mode is add or set, missing is error or ignore"
        )
    files = [each for each in (base, tuned) if isinstance(each, (str, os.PathLike, Checkpoint))]
    if len(files) < 2 or step is not None or names is not None:
        if (mode, missing, budget, density, out, progress, shard) != ("set", "error", *[None] * 5):
            raise ConfigError(
                "mode, missing, budget, density, out, progress and shard are for diffs of files; "
                "truncate and save the delta of live weights or a patch afterwards"
            )
        from deltakit.patching.stream import diff_states

        return diff_states(base, tuned, step=step, keep_base=keep_base, names=names)
    if shard is not None and out is None:
        raise ConfigError("a shard of a diff writes a part beside its output; give out (-o)")
    job = None if shard is None else Shard.parse(shard)
    old, new = (streamed(side, keep=keep_downloads) for side in files)
    sides = match(old, new, ignore_missing=missing == "ignore")
    wanted = Wanted(mode, keep_base, _count(budget, density, old.total_weights))
    if out is not None:
        _refuse_input(Path(out), sides)
    if job is not None and out is not None:
        return diff_share(Path(out), sides, wanted, job, force, workers, progress)
    if comes_by_file(old) or comes_by_file(new):
        return diff_by_file(None if out is None else Path(out), sides, wanted, workers)
    found = differing(sides, sides.shared, workers, progress)
    if out is None:
        collected = Collected()
        fill(collected, sides, wanted, found)
        return collected.delta
    with sdelta_stream(out) as stream:
        differ = fill(stream, sides, wanted, found)
    return report_of(Path(out), stream, sides, differ, mode)


def _count(budget: int | str | None, density: float | None, total: int) -> int | None:
    if density is None:
        return None if budget is None else parse_budget(budget, total)
    if budget is not None:
        raise ConfigError("budget and density are two ways to say one thing; give one of them")
    if not 0 <= density <= 1:
        raise BudgetError(f"density {density} is not a share of the base's weights from 0 to 1")
    return int(Fraction(str(density)) * total)


def _refuse_input(out: Path, sides: Sides) -> None:
    inputs = [*sides.base.files, *sides.tuned.files]
    if out.resolve() in [path.resolve() for path in inputs]:
        raise OutputError(f"{out} is one of the two checkpoints; give another output")
