"""What a delta tells about its training: where entries went and when, and how far they moved.

After figures 7 to 9 of ID3 (Agarwal et al. 2024): tensor sparsity, sparsity entropy, and the budget
of each tensor and of each kind of tensor over the steps of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, prod

import numpy as np

from deltakit.delta import SparseDelta, in_tensor_order
from deltakit.dtypes import Array
from deltakit.errors import ConfigError
from deltakit.groups import kind_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnmaskingHistory:
    """Entries per tensor after some steps of training.

    steps: int64 [S], 0-based and rising. names: T tensors, in tensor order. numels: their elements,
    int64 [T]. counts: entries of each tensor unmasked by the end of each step, int64 [S, T].
    """

    steps: Array
    names: tuple[str, ...]
    numels: Array
    counts: Array

    @property
    def entries(self) -> Array:
        """Entries over all tensors, int64 [S]."""
        return np.asarray(self.counts.sum(1))

    @property
    def tensor_sparsity(self) -> Array:
        """Share of the tensors that have no entry, float64 [S] in [0, 1]."""
        return np.asarray((self.counts == 0).mean(1))

    @property
    def sparsity_entropy(self) -> Array:
        """How evenly entries spread over tensors, float64 [S] in [0, 1].

        The entropy of p, divided by log T, where p is the share of all entries that each of the T
        tensors has: 1 when all have equally many, 0 when one has all (and before the first entry).
        ID3 names the quantity without an equation that fixes its normalisation; this one is ours.
        """
        shares = self.counts / np.maximum(self.entries, 1)[:, None]
        logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
        entropy = -(shares * logs).sum(1)
        return np.asarray(np.abs(entropy) / (log(max(len(self.names), 1)) or 1.0))

    @property
    def densities(self) -> Array:
        """Entries as a share of each tensor's elements, float64 [S, T]."""
        return np.asarray(self.counts / np.maximum(self.numels, 1))

    def by_kind(self) -> dict[str, Array]:
        """Entries of each kind of tensor, int64 [S]; a kind's names differ in numbers only."""
        kinds: dict[str, Array] = {}
        for column, name in enumerate(self.names):
            kind = kind_of(name)
            kinds[kind] = kinds.get(kind, np.zeros(len(self.steps), np.int64))
            kinds[kind] = kinds[kind] + self.counts[:, column]
        return kinds


def unmasking_history(
    delta: SparseDelta,
    *,
    steps: Sequence[int] | None = None,
    candidates: Mapping[str, Sequence[int]] | None = None,
) -> UnmaskingHistory:
    """The history of a delta's support, from the recorded order of its entries.

    steps: which to tell, rising; by default all at which an entry joined. candidates: name -> shape
    of every tensor that could have had entries; by default those that do, so that tensor sparsity
    ends at 0. A tensor that records no order counts as unmasked from step 0 on, as fixed supports
    are. Entries that left the support during training are not in the delta, and not counted.
    Raises ConfigError for steps that do not rise and for a delta with tensors that are no
    candidates. Takes O(nnz log nnz) time.
    """
    shapes = {name: tensor.shape for name, tensor in delta.tensors.items()}
    foreign = [] if candidates is None else [n for n in shapes if n not in candidates]
    if foreign:
        raise ConfigError(f"the delta's tensor {foreign[0]!r} is not among the candidates")
    told = in_tensor_order(shapes if candidates is None else candidates)
    orders = {
        name: np.sort(np.zeros(t.nnz, np.int64) if t.order is None else t.order)
        for name, t in delta.tensors.items()
    }
    if steps is None:
        at = np.unique(np.concatenate([*orders.values(), np.zeros(0, np.int64)]))
    else:
        at = np.asarray(steps, np.int64)
        if (np.diff(at) <= 0).any():
            raise ConfigError(f"steps of a history must rise, found {list(steps)}")
    counts = np.zeros((len(at), len(told)), np.int64)
    for column, name in enumerate(told):
        if name in orders:
            counts[:, column] = np.searchsorted(orders[name], at, side="right")
    numels = np.array([prod(shape) for shape in told.values()], np.int64)
    return UnmaskingHistory(steps=at, names=tuple(told), numels=numels, counts=counts)


def distances(delta: SparseDelta) -> dict[str, float]:
    """How far each tensor has moved from the base: the l2 norm of its changes.

    Raises DeltaError for a tensor in set mode that lacks base values. The whole delta's distance is
    the root of the sum of squares (`total_distance`).
    """
    return {
        name: float(np.linalg.norm(tensor.magnitudes().astype(np.float64)))
        for name, tensor in delta.tensors.items()
    }


def total_distance(distance_of: Mapping[str, float]) -> float:
    """The l2 norm over all tensors, from `distances`.

    Sparser masks travel further to reach an equal loss, with larger rates (random masking, Xu and
    Zhang 2024).
    """
    return float(np.linalg.norm(np.fromiter(distance_of.values(), np.float64)))
