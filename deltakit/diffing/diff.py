"""The exact sparse difference of two checkpoints.

An entry is every element whose bits differ; there is no threshold, and signed zeros and NaN
payloads count. Merging the result into the base gives the tuned tensors back, byte for byte,
unless a budget asks for the largest changes only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from deltakit.budget import parse_budget
from deltakit.delta import BaseIdentity, Fingerprint, Mode, SparseDelta, TensorDelta
from deltakit.differences import proven_differences
from deltakit.diffing.checkpoint_entries import Sides, match
from deltakit.diffing.report import DiffReport, report_of
from deltakit.dtypes import Array
from deltakit.errors import BudgetError, ConfigError, OutputError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta_stream import SdeltaStream, sdelta_stream
from deltakit.identity import identify
from deltakit.truncation import truncate

if TYPE_CHECKING:
    from deltakit.patching.states import State

Given = str | os.PathLike[str] | Checkpoint
Missing = Literal["error", "ignore"]
Progress = Callable[[int, int], None]


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
    there is replaced. progress: called with (elements done, elements in all).

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
        if (mode, missing, budget, density, out, progress) != ("set", "error", *[None] * 4):
            raise ConfigError(
                "mode, missing, budget, density, out and progress are for diffs of files; truncate "
                "and save the delta of live weights or a patch afterwards"
            )
        from deltakit.patching.stream import diff_states

        return diff_states(base, tuned, step=step, keep_base=keep_base, names=names)
    old, new = (c if isinstance(c, Checkpoint) else Checkpoint(os.fspath(c)) for c in files)
    sides = match(old, new, ignore_missing=missing == "ignore")
    count = _count(budget, density, old.total_weights)
    if out is None:
        collected = _Collected()
        _fill(collected, sides, count, mode, keep_base, progress)
        return collected.delta
    _refuse_input(Path(out), sides)
    with sdelta_stream(out) as stream:
        differing = _fill(stream, sides, count, mode, keep_base, progress)
    return report_of(Path(out), stream, sides, differing, mode)


class _Collected:
    """A delta in memory, made as `SdeltaStream` makes a file."""

    def __init__(self) -> None:
        self._tensors: dict[str, TensorDelta] = {}
        self._prints: dict[str, Fingerprint] = {}
        self._extras: dict[str, Array] = {}

    def add(self, tensor: TensorDelta, known: Fingerprint) -> None:
        """See SdeltaStream."""
        self._tensors[tensor.name] = tensor
        self._prints[tensor.name] = known

    def add_extra(self, name: str, array: Array) -> None:
        """See SdeltaStream."""
        self._extras[name] = array

    def finish(
        self, base: BaseIdentity, config: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> None:
        """Make the delta; the fingerprints of its base are those that came with the tensors."""
        self.delta = SparseDelta(
            tensors=self._tensors,
            extras=self._extras,
            base=replace(base, tensors=self._prints),
            config=config,
            provenance=provenance,
        )


def _fill(
    sink: _Collected | SdeltaStream,
    sides: Sides,
    count: int | None,
    mode: Mode,
    keep_base: bool,
    progress: Progress | None,
) -> int:
    """Put all of the delta into `sink`; returns how many elements differ."""
    provenance: dict[str, Any] = {"operation": "diff", "mode": mode}
    found: Iterable[TensorDelta] = sides.entries(progress)
    differing = kept = 0
    if count is not None:
        found, differing = _largest(found, count)
    for tensor in found:
        known = identify(sides.base, {tensor.name: tensor.indices}).tensors[tensor.name]
        sink.add(_stored(tensor, mode, keep_base), known)
        kept += tensor.nnz
    if kept < differing:
        provenance["lossy"] = {"budget": count, "by": "magnitude", "from": differing}
    extras = False
    for name, array in sides.extras():
        sink.add_extra(name, array)
        extras = True
    config = sides.config_changes() if extras else {}
    sink.finish(identify(sides.base, {}), config, provenance)
    return max(differing, kept)


def _largest(found: Iterable[TensorDelta], count: int) -> tuple[list[TensorDelta], int]:
    """The `count` entries with the largest changes, and how many there were.

    What is dropped early is never missed: an entry that `count` others before it beat, ties
    included, is beaten in the end. So no more than 2 * count entries and one tensor are held.
    """
    held: dict[str, TensorDelta] = {}
    seen = 0
    for tensor in found:
        held[tensor.name] = tensor
        seen += tensor.nnz
        if sum(t.nnz for t in held.values()) > 2 * count:
            held = dict(truncate(SparseDelta(tensors=held), count).tensors)
    return list(truncate(SparseDelta(tensors=held), count).tensors.values()), seen


def _stored(tensor: TensorDelta, mode: Mode, keep_base: bool) -> TensorDelta:
    """A set tensor with base values as it is asked for; set where add has no proof."""
    assert tensor.base_values is not None
    values = None
    if mode == "add":
        values = proven_differences(tensor.base_values, tensor.values, tensor.kind)
    if values is not None:
        return replace(tensor, mode="add", values=values, base_values=None)
    return tensor if keep_base else replace(tensor, base_values=None)


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
