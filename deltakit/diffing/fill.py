"""Putting what differs between two checkpoints into a delta, in memory or in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from deltakit.delta import (
    BaseIdentity,
    Fingerprint,
    Mode,
    SparseDelta,
    TensorDelta,
    in_tensor_order,
)
from deltakit.differences import proven_differences
from deltakit.diffing.checkpoint_entries import Sides
from deltakit.dtypes import Array
from deltakit.formats.sdelta_stream import SdeltaStream
from deltakit.identity import fingerprint, fingerprint_of, identify
from deltakit.shares import in_order
from deltakit.truncation import truncate

Progress = Callable[[int, int], None]
Known = tuple[TensorDelta, Fingerprint]  # a tensor, and by what its base is known again


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a diff is to hold: `mode` and `keep_base` as for `deltakit.diff`, and how many entries
    at most (count; None: all)."""

    mode: Mode
    keep_base: bool
    count: int | None

    def stored(self, tensor: TensorDelta) -> TensorDelta:
        """A set tensor with base values as it is asked for; set where add has no proof."""
        assert tensor.base_values is not None
        values = None
        if self.mode == "add":
            values = proven_differences(tensor.base_values, tensor.values, tensor.kind)
        if values is not None:
            return replace(tensor, mode="add", values=values, base_values=None)
        return tensor if self.keep_base else replace(tensor, base_values=None)


class Collected:
    """A delta in memory, made as `SdeltaStream` makes a file; tensors come in any order."""

    def __init__(self) -> None:
        self._tensors: dict[str, TensorDelta] = {}
        self._prints: dict[str, Fingerprint] = {}
        self._extras: dict[str, Array] = {}

    @property
    def extras(self) -> Mapping[str, Array]:
        """See SdeltaStream."""
        return self._extras

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
            base=replace(base, tensors=in_tensor_order(self._prints)),
            config=config,
            provenance=provenance,
        )


Sink = Collected | SdeltaStream


def differing(
    sides: Sides, names: Iterable[str], workers: int | None, progress: Progress | None
) -> Iterator[Known]:
    """Those of the tensors `names` that differ, in tensor order; a few at a time.

    progress: called with (elements done, elements in all).
    """

    def compare(name: str) -> Known | None:
        tensor = sides.entries(name)
        if tensor is None:
            return None
        return tensor, fingerprint_of(sides.base, name, tensor.indices)

    wanted = frozenset(names)
    ordered = [name for name in sides.shared if name in wanted]
    total, done = sum(sides.numel(name) for name in ordered), 0
    for name, found in zip(ordered, in_order(compare, ordered, workers), strict=True):
        if found is not None:
            yield found
        done += sides.numel(name)
        if progress is not None:
            progress(done, total)


def add_entries(sink: Sink, found: Iterable[Known], wanted: Wanted) -> int:
    """Put tensors into `sink` as they are wanted; returns how many entries there were."""
    seen = 0
    if wanted.count is None:
        for tensor, known in found:
            sink.add(wanted.stored(tensor), known)
            seen += tensor.nnz
        return seen
    kept, seen = largest(found, wanted.count)
    for tensor, known in kept:
        sink.add(wanted.stored(tensor), known)
    return seen


def add_extras(sink: Sink, sides: Sides, names: Iterable[str]) -> None:
    """Put what is kept whole of the tensors `names` into `sink`, one at a time."""
    wanted = frozenset(names)
    for name in sides.names:
        extra = sides.extra(name) if name in wanted else None
        if extra is not None:
            sink.add_extra(*extra)


def finish(sink: Sink, sides: Sides, wanted: Wanted, differ: int) -> None:
    """Make the delta of what was put into `sink`, of `differ` entries that differ."""
    provenance: dict[str, Any] = {"operation": "diff", "mode": wanted.mode}
    if wanted.count is not None and wanted.count < differ:
        provenance["lossy"] = {"budget": wanted.count, "by": "magnitude", "from": differ}
    config = sides.config_changes() if sink.extras else {}
    sink.finish(identify(sides.base, {}), config, provenance)


def fill(sink: Sink, sides: Sides, wanted: Wanted, found: Iterable[Known]) -> int:
    """Make the whole delta: of the tensors `found` to differ, and of all that is kept whole; returns
    how many elements differ."""
    differ = add_entries(sink, found, wanted)
    add_extras(sink, sides, sides.names)
    finish(sink, sides, wanted, differ)
    return differ


def largest(found: Iterable[Known], count: int) -> tuple[list[Known], int]:
    """The `count` entries with the largest changes, and how many there were.

    What is dropped early is never missed: an entry that `count` others before it beat, ties
    included, is beaten in the end. So no more than 2 * count entries and one tensor are held.
    """
    held: dict[str, TensorDelta] = {}
    prints: dict[str, Fingerprint] = {}
    seen = 0
    for tensor, known in found:
        held[tensor.name], prints[tensor.name] = tensor, known
        seen += tensor.nnz
        if sum(t.nnz for t in held.values()) > 2 * count:
            held = dict(truncate(SparseDelta(tensors=held), count).tensors)
    kept = truncate(SparseDelta(tensors=held), count).tensors
    return [(tensor, _known_by(tensor, prints[name])) for name, tensor in kept.items()], seen


def _known_by(tensor: TensorDelta, known: Fingerprint) -> Fingerprint:
    """The fingerprint of a set tensor's base at the entries that are left of it."""
    assert tensor.base_values is not None
    values = tensor.base_values.view(tensor.kind.numpy)
    return replace(known, support=fingerprint(values[:0], values).support)
