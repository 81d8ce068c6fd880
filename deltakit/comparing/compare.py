"""Comparing deltas: shared supports, opposite signs and directions, for every pair.

What two fine-tunings change together is where merging interferes: entries that both move add up,
and those moved in opposite directions cancel (Yadav et al., "TIES-Merging", 2023).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from deltakit.adapters.refusal import require_one_adapter
from deltakit.comparing.base_agreement import Agreement, base_agreement
from deltakit.comparing.overlap import Entries, Overlap, overlap_of
from deltakit.delta import SparseDelta, TensorDelta
from deltakit.differences import changes_of
from deltakit.dtypes import Array
from deltakit.errors import ConfigError, DeltaError
from deltakit.formats.sdelta import SdeltaFile, load
from deltakit.groups import block_of, kind_of, natural_order
from deltakit.hub.locate import label_of

Given = SparseDelta | str | os.PathLike[str]
COLLISION = 0.1  # share of the smaller delta's entries moved the opposite way that is worth a word


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One delta of a comparison: its label (path or position), entries and touched tensors."""

    label: str
    entries: int
    tensors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two deltas of a comparison.

    first, second: their positions. base: whether they belong to one base, and what shows it.
    tensors: name -> how they meet there, for each tensor that either touches, in tensor order; empty
    where the entries stand at different weights, as those of different adapters do, which `apart`
    says in words. folded_cosine: of the changes that two adapters make to the base's weights, where
    that can be told without the base.
    """

    first: int
    second: int
    base: Agreement
    tensors: Mapping[str, Overlap]
    apart: str = ""
    folded_cosine: float | None = None

    @property
    def total(self) -> Overlap:
        """Over all tensors."""
        return Overlap.combined(self.tensors.values())

    @property
    def kinds(self) -> dict[str, Overlap]:
        """By kind of tensor: all whose names differ in numbers only."""
        return self.grouped(kind_of)

    @property
    def blocks(self) -> dict[str, Overlap]:
        """By block of layers."""
        return self.grouped(block_of)

    def grouped(self, key: Callable[[str], str]) -> dict[str, Overlap]:
        """The tensors counted together by `key` of their names, in natural order."""
        members: dict[str, list[Overlap]] = {}
        for name, overlap in self.tensors.items():
            members.setdefault(key(name), []).append(overlap)
        names = sorted(members, key=natural_order)
        return {name: Overlap.combined(members[name]) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What `compare` found: the deltas, and every pair of them in order."""

    deltas: tuple[Compared, ...]
    pairs: tuple[Pair, ...]

    def matrix(self, of: Callable[[Overlap], float | None], diagonal: float) -> Array:
        """`of` for every pair, float64 [deltas, deltas], symmetric; NaN where it is None."""
        made = np.full((len(self.deltas), len(self.deltas)), np.nan)
        np.fill_diagonal(made, diagonal)
        for pair in self.pairs:
            value = of(pair.total)
            made[pair.first, pair.second] = np.nan if value is None else value
            made[pair.second, pair.first] = made[pair.first, pair.second]
        return made

    @property
    def notes(self) -> list[str]:
        """What the numbers do not say by themselves: different bases, changes that are unknown."""
        told = []
        for pair in self.pairs:
            if pair.base.verdict != "same":
                differ = pair.base.verdict == "different"
                what = "belong to different bases" if differ else "may belong to different bases"
                told.append(f"{self._labels(pair)} {what}: {pair.base.why}")
            if pair.apart:
                told.append(f"{self._labels(pair)} are not compared entry by entry: {pair.apart}")
            if pair.folded_cosine is not None:
                told.append(
                    f"{self._labels(pair)}: the cosine of the changes that they make to the base's "
                    f"weights is {pair.folded_cosine:+.3f}"
                )
            if unknown := pair.total.unknown:
                told.append(
                    f"{self._labels(pair)}: {unknown:,} changes are not known or not finite (set "
                    "mode without base values), so signs are compared where they are known and the "
                    "cosine is left out"
                )
        return told

    @property
    def warning(self) -> str | None:
        """One line where stacking would collide much, None otherwise.

        Much is a pair where at least a tenth (`COLLISION`) of the smaller delta's entries are moved
        the opposite way by the other; shared entries of unknown sign count half.
        """
        shares = [(pair.total.collision, -at, pair) for at, pair in enumerate(self.pairs)]
        worst = [found for found in sorted(shares, reverse=True) if found[0] >= COLLISION]
        if not worst:
            return None
        share, _, pair = worst[0]
        more = len(worst) - 1
        how = "are" if pair.total.signed == pair.total.shared else "are, by estimate,"
        rest = f"; so do {more} other pair{'s' if more > 1 else ''}" if more else ""
        return (
            f"{self._labels(pair)} collide: {100 * share:.0f} % of the smaller one's entries {how} "
            f"moved the opposite way by the other, and cancel in a sum{rest}; ties elects signs"
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "deltas": [
                {"label": d.label, "entries": d.entries, "tensors": d.tensors} for d in self.deltas
            ],
            "pairs": [
                {
                    "first": pair.first,
                    "second": pair.second,
                    "base": pair.base.verdict,
                    "base_evidence": pair.base.why,
                    "apart": pair.apart or None,
                    "folded_cosine": pair.folded_cosine,
                    **pair.total.as_dict(),
                    "kinds": {name: part.as_dict() for name, part in pair.kinds.items()},
                    "blocks": {name: part.as_dict() for name, part in pair.blocks.items()},
                    "tensors": {name: part.as_dict() for name, part in pair.tensors.items()},
                }
                for pair in self.pairs
            ],
            "collision_threshold": COLLISION,
            "warning": self.warning,
            "notes": self.notes,
        }

    def _labels(self, pair: Pair) -> str:
        return f"{self.deltas[pair.first].label} and {self.deltas[pair.second].label}"


def compare(
    deltas: Sequence[Given], *, progress: Callable[[int, int], None] | None = None
) -> Comparison:
    """How deltas overlap, disagree and point, pair by pair.

    deltas: at least two SparseDelta objects or paths of .sdelta files. Files are read tensor by
    tensor: one tensor of every delta is in memory at a time. progress: called with (tensors done,
    tensors in all). Extras are not compared. Entries of
    tensors whose shapes differ do not meet, nor do those of different adapters. Takes O(n log n) time in the entries, for each pair.
    Raises ConfigError for fewer than two deltas, MissingFileError and FormatError as `load` does.
    """
    if isinstance(deltas, (SparseDelta, str, os.PathLike)) or len(deltas) < 2:
        raise ConfigError("a comparison takes at least two deltas")
    with ExitStack() as stack:
        sides = [
            each if isinstance(each, SparseDelta) else stack.enter_context(SdeltaFile(each))
            for each in deltas
        ]
        places = list(combinations(range(len(sides)), 2))
        found: dict[tuple[int, int], dict[str, Overlap]] = {place: {} for place in places}
        apart = {(one, other): _apart(sides[one], sides[other]) for one, other in places}
        names = sorted({name for side in sides for name in side.tensors}, key=str.encode)
        for done, name in enumerate(names, 1):
            held = [_entries(side, name) for side in sides]
            for one, other in places:
                if apart[one, other]:
                    continue
                if held[one] is not None or held[other] is not None:
                    found[one, other][name] = overlap_of(held[one], held[other])
            if progress is not None:
                progress(done, len(names))
        told = [
            Compared(
                label=f"delta {at}" if isinstance(given, SparseDelta) else label_of(given),
                entries=sum(tensor.nnz for tensor in side.tensors.values()),
                tensors=len(side.tensors),
            )
            for at, (given, side) in enumerate(zip(deltas, sides, strict=True))
        ]
        pairs = [
            Pair(
                first=one,
                second=other,
                base=base_agreement(sides[one], sides[other]),
                tensors=found[one, other],
                apart=apart[one, other],
                folded_cosine=_folded_cosine(sides[one], sides[other]),
            )
            for one, other in places
        ]
    return Comparison(deltas=tuple(told), pairs=tuple(pairs))


def _apart(one: SparseDelta | SdeltaFile, other: SparseDelta | SdeltaFile) -> str:
    """Why entries of two deltas stand at different weights; empty where they do not."""
    try:
        require_one_adapter(one.adapter, other.adapter)
    except DeltaError as error:
        return str(error)
    return ""


def _folded_cosine(one: SparseDelta | SdeltaFile, other: SparseDelta | SdeltaFile) -> float | None:
    if one.adapter is None or other.adapter is None:
        return None
    from deltakit.comparing.folded_cosine import folded_cosine

    whole = [side if isinstance(side, SparseDelta) else load(side.path) for side in (one, other)]
    return folded_cosine(whole[0], whole[1])


def _entries(side: SparseDelta | SdeltaFile, name: str) -> Entries | None:
    if name not in side.tensors:
        return None
    found = side.tensors[name] if isinstance(side, SparseDelta) else side.tensor(name)
    assert isinstance(found, TensorDelta)
    return Entries(found.shape, found.indices, changes_of(found))
