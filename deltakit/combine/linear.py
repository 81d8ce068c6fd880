"""The linear sum that merging itself is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from deltakit.combine.method import METHODS, Flavours, Method
from deltakit.combine.tasks import Tasks
from deltakit.delta import TensorDelta
from deltakit.dtypes import Array
from deltakit.errors import BaseMismatchError, DeltaError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.merging.arithmetic import Contribution, merged_words


@METHODS.register("linear", "weighted sum, bit for bit what merging all at once does")
@dataclass(frozen=True, kw_only=True)
class Linear(Method):
    """tau = sum_t w_t tau_t: s = 0, then s = s + (w * v) for each delta in order, never fused.

    Merging the result gives the very bits that merging all deltas at once with these weights gives
    (times `scale`, and divided by their sum with `normalize`, both in double precision). So entries
    that sum to zero stay: writing one turns a base's -0.0 into 0.0. Tensors with `set` entries
    become `set` and keep the base's bits, which must be known for every entry.
    """

    flavours: ClassVar[Flavours] = {"mergekit": {"normalize": True}, "peft": {}}

    normalize: bool = False

    def stack(self, tasks: Tasks) -> dict[str, TensorDelta]:
        return {name: tensor for name, tensor in self._made(tasks).items() if tensor.nnz}

    def _made(self, tasks: Tasks) -> dict[str, TensorDelta]:
        names, made = tasks.names(), {}
        for done, name in enumerate(names, 1):
            factor = self.scale
            if self.normalize:
                factor /= sum(task.weights[name] for task in tasks) or 1.0
            made[name] = added(
                [Contribution(c.weight * factor, c.delta) for c in tasks.contributions(name)],
                tasks.base,
            )
            if tasks.progress is not None:
                tasks.progress(done, len(names))
        return made


def added(contributions: Sequence[Contribution], base: Checkpoint | None) -> TensorDelta:
    """One tensor that merges to the bits to which the contributions merge.

    base: gives the base's bits where the deltas do not record them. Raises DeltaError where they
    are not known and needed, BaseMismatchError where deltas record different ones, and what
    `merged_words` raises.
    """
    first = contributions[0].delta
    at = np.sort(np.concatenate([c.delta.indices for c in contributions]), kind="stable")
    at = at[np.diff(at, prepend=-1) != 0]
    if all(c.delta.mode == "add" for c in contributions):
        values = np.zeros(len(at), first.values.dtype)
        for c in contributions:
            weight = values.dtype.type(c.weight)
            values[np.searchsorted(at, c.delta.indices)] += weight * c.delta.values
        return plain(first, indices=at, values=values)
    words = _base_words(first, at, contributions, base)
    changed = merged_words(words, at, contributions, first.kind)
    return replace(plain(first, indices=at, values=changed, mode="set"), base_values=words)


def plain(like: TensorDelta, *, indices: Array, values: Array, mode: str = "add") -> TensorDelta:
    """A tensor with the name, shape and dtypes of `like`, without order, base values and seed."""
    return TensorDelta(
        name=like.name,
        shape=like.shape,
        dtype=like.dtype,
        mode="set" if mode == "set" else "add",
        indices=indices,
        values=values,
        trained_dtype=like.trained_dtype,
    )


def _base_words(
    first: TensorDelta, at: Array, contributions: Sequence[Contribution], base: Checkpoint | None
) -> Array:
    """The base's raw words at `at`, [n]: recorded ones, and the others from the base."""
    known = np.zeros(len(at), bool)
    words = np.zeros(len(at), first.kind.words) if base is None else base.gather(first.name, at)
    for delta in (c.delta for c in contributions if c.delta.base_values is not None):
        place = np.searchsorted(at, delta.indices)
        clash = known[place] & (words[place] != delta.base_values)
        if clash.any():
            raise BaseMismatchError(
                f"tensor {first.name!r}: two deltas record different base values at index "
                f"{delta.indices[clash][0]}; they belong to different bases"
            )
        words[place] = delta.base_values
        known[place] = True
    if base is None and not known.all():
        raise DeltaError(
            f"tensor {first.name!r} is in set mode and the base's value at index {at[~known][0]} "
            "is not recorded; give the base, or stack by task-arithmetic, which adds up changes"
        )
    return words
