"""What is applied to a model: the deltas in order, and the base's bits under their entries.

Every state is worked out from the base's bits by the rule of merging, so it equals merging what is
applied at once, whatever was applied, weighted or swapped before, and nothing applied is the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array, dtype
from deltakit.errors import CoordinateError, nearest
from deltakit.live.arrays import dtype_name
from deltakit.live.words import Words, check_dtype, make_words, read_words, write_all
from deltakit.merging.arithmetic import Contribution, merged_words
from deltakit.merging.inputs import Input, common_extras

if TYPE_CHECKING:
    from deltakit.live.adapters import LiveAdapter


@dataclass(frozen=True, eq=False)
class Applied:
    """A delta and its weight; its tensors and extras by live name, in the model's coordinates.

    Live names are those without adapters. adapter: of a delta of one, which has no tensors then.
    """

    delta: SparseDelta
    weight: float
    tensors: Mapping[str, Sequence[TensorDelta]]
    extras: Mapping[str, Sequence[TensorDelta]]
    adapter: LiveAdapter | None = None

    @property
    def names(self) -> list[str]:
        """Live names of all that it touches."""
        return list({**self.tensors, **self.extras})

    def contributions(self, name: str) -> list[Contribution]:
        """Its parts in a live tensor; weights do not apply to extras."""
        entries = [Contribution(self.weight, part) for part in self.tensors.get(name, ())]
        return entries + [Contribution(1.0, part) for part in self.extras.get(name, ())]


@dataclass(frozen=True, slots=True, eq=False)
class Bits:
    """The base's words [n] at sorted flat indices, int64 [n], and the dtype that they are of."""

    indices: Array
    words: Array
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Change:
    """What is to be written, and the base's bits under all entries in it."""

    name: str
    write: Words
    saved: Bits


@dataclass(eq=False)
class Ledger:
    """applied: in the order of merging. saved: live name -> the base's bits under its entries."""

    applied: list[Applied] = field(default_factory=list)
    saved: dict[str, Bits] = field(default_factory=dict)

    def base_words(self, name: str, tensor: torch.Tensor, at: Array) -> Array:
        """The base's words [n] at sorted flat indices [n] of a live tensor."""
        kept = self.saved.get(name)
        if kept is not None:
            check_dtype(name, tensor, kept.dtype)
            if np.array_equal(kept.indices, at):
                return kept.words.copy()
        words = read_words(name, tensor, at)
        if kept is not None:
            place = np.minimum(np.searchsorted(kept.indices, at), len(kept.indices) - 1)
            known = kept.indices[place] == at
            words[known] = kept.words[place[known]]
        return words

    def plan(self, live: Mapping[str, torch.Tensor], applied: Sequence[Applied]) -> list[Change]:
        """All that must be written for `applied` to be what is applied; writes nothing.

        Raises DeltaError for extras and `set` entries that differ, as merging does.
        """
        inputs = [Input(f"delta {n}", None, a.delta, a.weight) for n, a in enumerate(applied)]
        common_extras(inputs, None)
        kept = [each for each in self.applied if any(each is other for other in applied)]
        moved = [each for each in (*self.applied, *applied) if not any(each is k for k in kept)]
        touched = dict.fromkeys(name for each in moved for name in each.names)
        return [
            self._change(name, _find(name, live), applied, self.saved.get(name)) for name in touched
        ]

    def alone(self, live: Mapping[str, torch.Tensor], applied: Applied) -> list[Change]:
        """What must be written onto the base for `applied` to be all that is applied."""
        return [self._change(n, _find(n, live), [applied], None) for n in applied.names]

    def commit(self, changes: Sequence[Change], applied: Sequence[Applied]) -> None:
        """Write a plan."""
        write_all([change.write for change in changes])
        for change in changes:
            if len(change.saved.indices):
                self.saved[change.name] = change.saved
            else:
                self.saved.pop(change.name, None)
        self.applied = list(applied)

    def _change(
        self, name: str, tensor: torch.Tensor, applied: Sequence[Applied], old: Bits | None
    ) -> Change:
        """The new words of one tensor, and of the entries `old` that need their base's back."""
        parts = [part for each in applied for part in each.contributions(name)]
        support = _union([part.delta.indices for part in parts])
        at = support if old is None else _union([support, old.indices])
        base = self.base_words(name, tensor, at)
        own = np.searchsorted(at, support) if len(at) > len(support) else slice(None)
        new = base.copy()
        if parts:
            kind = dtype(dtype_name(tensor))
            new[own] = merged_words(base[own], support, parts, kind)
        return Change(
            name, make_words(name, tensor, at, new), Bits(support, base[own], tensor.dtype)
        )


def _union(indices: Sequence[Array]) -> Array:
    given = [each for each in indices if len(each)]
    if len(given) < 2:
        return given[0] if given else np.zeros(0, np.int64)
    together = np.concatenate(given)
    together.sort(kind="stable")  # merges what is sorted already
    return np.asarray(together[np.concatenate([[True], together[1:] != together[:-1]])])


def _find(name: str, live: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if name not in live:
        raise CoordinateError(
            f"the model has no tensor {name!r} any more{nearest(name, list(live))}"
        )
    return live[name]
