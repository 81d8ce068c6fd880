"""Adapters in a merge: what they change, made window by window while the base is streamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deltakit.adapters.fold_delta import changes_of_adapter
from deltakit.adapters.fold_dora import Dora
from deltakit.adapters.fold_products import Change, window
from deltakit.delta import TensorDelta
from deltakit.dtypes import Array, DType, add_exact
from deltakit.errors import DeltaError, DeltakitError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.safetensors_file import TensorInfo
from deltakit.merging.arithmetic import Contribution, cast, merged_words, union_between
from deltakit.merging.inputs import Input

_FILES = 4  # that a merge writes at a time at most
_ELEMENT, _TERM = 64, 48  # bytes of working arrays for each element of a window, and of each term


@dataclass(frozen=True, slots=True)
class Folding:
    """One adapter's part in a tensor of the base, and its weight.

    It is a term of the sum like the values of an `add` delta that has entries wherever the adapter
    changes anything, so that all other elements keep their bits.
    """

    weight: float
    change: Change
    info: TensorInfo

    def values(self, start: int, stop: int) -> Array:
        """Its changes of the flat elements [start, stop), float32 [stop - start]; DeltaError where
        one is not finite."""
        with np.errstate(over="ignore", invalid="ignore"):  # refused here
            values = window(self.change, start, stop)
        if not np.isfinite(values).all():
            raise DeltaError(f"tensor {self.info.name!r}: what the adapter adds is not finite")
        return values

    def within(self, start: int, stop: int) -> Contribution:
        """Its entries with flat indices in [start, stop)."""
        values = self.values(start, stop)
        at = np.flatnonzero(values != 0)
        entries = TensorDelta(
            name=self.info.name,
            shape=self.info.shape,
            dtype=self.info.dtype,
            mode="add",
            indices=at + start,
            values=values[at],
        )
        return Contribution(self.weight, entries)


Term = Contribution | Folding
# Changes the words of a window in place; returns those that it may have changed before and after.
Merging = Callable[[Array], tuple[Array, Array]]


def merging(terms: Sequence[Term], start: int, stop: int, kind: DType) -> Merging | None:
    """What merges the terms into words of dtype `kind` of the flat elements [start, stop) of a
    tensor, by the rule of `deltakit.merging.arithmetic`; None where no term has an entry."""
    if terms and all(isinstance(term, Folding) for term in terms):
        return _folding_alone([t for t in terms if isinstance(t, Folding)], start, stop, kind)
    parts = [term.within(start, stop) for term in terms]
    at = union_between(parts, start, stop) if parts else np.empty(0, int)
    if not at.size:
        return None

    def merge(words: Array) -> tuple[Array, Array]:
        place = at - start
        before = words[place]
        after = merged_words(before, at, parts, kind)
        words[place] = after
        return before, after

    return merge


def _folding_alone(terms: Sequence[Folding], start: int, stop: int, kind: DType) -> Merging | None:
    """The same without lists of entries, as adapters change nearly all elements of a tensor."""
    weighted = [(term.weight, term.values(start, stop)) for term in terms]
    moved = np.logical_or.reduce([values != 0 for _, values in weighted])
    if not moved.any():
        return None

    def merge(words: Array) -> tuple[Array, Array]:
        before = words.copy()
        with np.errstate(over="ignore", invalid="ignore"):  # too large becomes inf, as in torch
            after = add_exact(words.view(kind.numpy), weighted).view(kind.words)
        np.copyto(words, after, where=moved)
        return before, words

    return merge


def fold(
    inputs: Sequence[Input], base: Checkpoint, merge_kind: Callable[[TensorInfo], DType]
) -> dict[str, list[Term]]:
    """Tensor of the base at which adapters stand -> all that is merged into it, in order.

    merge_kind: the dtype in which a tensor is merged. Raises as
    `deltakit.adapters.fold_delta.changes_of_adapter` does, and DeltaError for tensors that have no sums.
    """

    def read(name: str, start: int, stop: int) -> Array:
        info = base.info(name)
        kind = merge_kind(info)
        words = cast(base.read(name, start, stop), info.kind, kind)
        with np.errstate(over="ignore"):  # of float64
            return words.view(kind.numpy).astype(np.float32)

    terms: dict[str, list[Term]] = {}
    stand: dict[str, None] = {}
    for each in inputs:
        if each.delta.adapter is None:
            for name, tensor in each.delta.tensors.items():
                if tensor.nnz:
                    terms.setdefault(name, []).append(Contribution(each.weight, tensor))
            continue
        try:
            changes = changes_of_adapter(each.delta, base, read)
            for name, change in changes.items():
                info = base.info(name)
                if info.kind.compute is None:
                    raise DeltaError(
                        f"tensor {name!r} is {info.dtype}, for which sums are not defined"
                    )
                terms.setdefault(name, []).append(Folding(each.weight, change, info))
                stand[name] = None
        except DeltakitError as error:
            raise type(error)(f"{each.label}: {error}") from None
    return {name: terms[name] for name in stand}


def folding_memory(terms: Mapping[str, Sequence[Term]], elements: int, files: int) -> int:
    """Upper estimate, in bytes, of what folding keeps in memory beside the base and the deltas: all
    factors, trained and as they are multiplied, windows of `elements` in as many files as are
    written at a time, and one weight whose norms give DoRA's initial magnitudes.
    """
    foldings = [t for found in terms.values() for t in found if isinstance(t, Folding)]
    if not foldings:
        return 0
    changes = [folding.change for folding in foldings]
    whole = max((f.info.nbytes for f in foldings if isinstance(f.change, Dora)), default=0)
    several = max(len(found) for found in terms.values())
    rows = elements + 2 * max(change.shape[1] for change in changes)  # begun and ended by a part
    window = rows * (_ELEMENT + _TERM * several)
    return 2 * sum(change.held for change in changes) + window * min(files, _FILES) + whole
