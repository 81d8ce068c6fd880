"""What an entry becomes when deltas are merged onto it: the one rule of `deltakit merge`.

`add` entries, and `set` entries with a weight other than 1 or that meet entries of other deltas,
are sums: round(float32(base) + (0 + w1 * v1 + w2 * v2 + ...)), where the v of a `set` entry is its
new value minus the base's, in float32. `set` entries with weight 1 that meet nothing else are
written as they are, bit for bit; where several such deltas meet they must agree, and count once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltakit.delta import TensorDelta
from deltakit.dtypes import Array, DType, add_exact
from deltakit.errors import DeltaError


@dataclass(frozen=True, slots=True)
class Contribution:
    """One delta's part in a tensor, and its weight."""

    weight: float
    delta: TensorDelta

    @property
    def writes_bits(self) -> bool:
        """Whether its entries are bits to be written rather than terms of a sum."""
        return self.delta.mode == "set" and self.weight == 1

    def between(self, start: int, stop: int) -> slice:
        """The positions of its entries with flat indices in [start, stop)."""
        indices = self.delta.indices
        return slice(int(indices.searchsorted(start)), int(indices.searchsorted(stop)))

    def within(self, start: int, stop: int) -> Contribution:
        """A contribution that has all its entries with flat indices in [start, stop): itself."""
        return self


def cast(words: Array, source: DType, target: DType) -> Array:
    """Raw words [n] of dtype `source` as words of dtype `target`, rounded to nearest even."""
    if source is target:
        return words
    with np.errstate(over="ignore", invalid="ignore"):  # too large becomes inf, as in torch
        return np.asarray(words.view(source.numpy).astype(target.numpy).view(target.words))


def union_between(contributions: Sequence[Contribution], start: int, stop: int) -> Array:
    """The sorted flat indices in [start, stop) that any of the contributions changes, int64 [n]."""
    found = [c.delta.indices[c.between(start, stop)] for c in contributions]
    return found[0] if len(found) == 1 else np.unique(np.concatenate(found))


def merged_words(
    base: Array, at: Array, contributions: Sequence[Contribution], kind: DType
) -> Array:
    """The raw words that entries get.

    base: the base's words [n] of dtype `kind` at the sorted flat indices `at`, int64 [n]. Entries
    of the contributions outside [at[0], at[-1]] are left alone; those inside must all be in `at`.
    Raises DeltaError when `set` deltas of weight 1 disagree on an entry, when a dtype has no
    arithmetic, and when a `set` value that must be weighted is not finite.
    """
    if not at.size:
        return base.copy()
    if len(contributions) == 1 and contributions[0].delta.mode == "add":  # by far the most common
        (only,) = contributions
        values = only.delta.values[only.between(int(at[0]), int(at[-1]) + 1)]
        return _added(base, [(only.weight, values)], kind)
    result = base.copy()
    written, summed = np.zeros(len(at), bool), np.zeros(len(at), bool)
    terms = []  # (contribution, positions in its delta, positions in `at`)
    for contribution in contributions:
        part = contribution.between(int(at[0]), int(at[-1]) + 1)
        own = np.arange(part.start, part.stop)
        place = np.searchsorted(at, contribution.delta.indices[part])
        if contribution.writes_bits:
            fresh = ~written[place]
            _write(contribution.delta, own, place, result, written, kind)
            own, place = own[fresh], place[fresh]
        else:
            summed[place] = True
        terms.append((contribution, own, place))
    if summed.any():
        chosen = np.flatnonzero(summed)
        weighted = []
        for contribution, own, place in terms:
            values = np.zeros(len(at), _compute(contribution.delta, kind))
            values[place] = _changes(contribution.delta, own, base[place], kind, summed[place])
            weighted.append((contribution.weight, values[chosen]))
        result[chosen] = _added(base[chosen], weighted, kind)
    return result


def _write(
    delta: TensorDelta, own: Array, place: Array, result: Array, written: Array, kind: DType
) -> None:
    bits = cast(delta.values[own], delta.kind, kind)
    clash = written[place] & (result[place] != bits)
    if clash.any():
        raise DeltaError(
            f"tensor {delta.name!r}: {int(clash.sum())} or more entries are set to different "
            f"values by two deltas (such as index {delta.indices[own][clash][0]}); give weights "
            "other than 1 to add up their changes"
        )
    result[place] = bits
    written[place] = True


def _changes(delta: TensorDelta, own: Array, base: Array, kind: DType, needed: Array) -> Array:
    """The changes [n] that entries `own` of a delta make to base words [n] in the dtype of sums.

    For `set` entries the base's bits recorded in the delta come first, then `base`. Where `needed`
    is False the result is of no use and may be anything.
    """
    if delta.mode == "add":
        return delta.values[own]
    compute = _compute(delta, kind)
    before = base.view(kind.numpy)
    if delta.base_values is not None:
        before = delta.base_values[own].view(delta.kind.numpy)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
        after = delta.values[own].view(delta.kind.numpy)
        changes = np.asarray(after.astype(compute) - before.astype(compute))
    broken = needed & ~np.isfinite(changes)
    if broken.any():
        raise DeltaError(
            f"tensor {delta.name!r}: the change at index {delta.indices[own][broken][0]} is not "
            "finite, so it cannot be weighted or added to others"
        )
    return changes


def _compute(delta: TensorDelta, kind: DType) -> np.dtype[Any]:
    if kind.compute is None:
        raise DeltaError(
            f"tensor {delta.name!r} is {kind.name}, for which weights and sums are not defined; "
            "merge one set delta with weight 1"
        )
    return kind.compute


def _added(base: Array, weighted: list[tuple[float, Array]], kind: DType) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):  # too large becomes inf, as in torch
        return add_exact(base.view(kind.numpy), weighted).view(kind.words)
