"""Truncating a delta to a smaller budget, exactly.

By magnitude keeps the largest changes. By order keeps the entries that were unmasked first, so
budgets nest: the entries of a smaller budget are among those of every larger one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from deltakit.budget import parse_budget
from deltakit.delta import BaseIdentity, SparseDelta, TensorDelta
from deltakit.dtypes import Array
from deltakit.errors import ConfigError, DeltaError

if TYPE_CHECKING:
    from deltakit.formats.checkpoint import Checkpoint

By = Literal["magnitude", "order"]


def truncate(
    delta: SparseDelta,
    budget: int | str,
    by: By = "magnitude",
    base: str | Path | Checkpoint | None = None,
) -> SparseDelta:
    """The `budget` best entries of a delta; exactly min(budget, delta.nnz) of them.

    budget: a count (100_000, "100k") or a share of all weights of the base ("0.1%"); for the delta
    of an adapter a share of the adapter's own weights.
    by: "magnitude" keeps the largest |change| (|v| for add, |v - base| for set; a change to or from
    a non-finite value is the largest there is); "order" keeps the entries unmasked first. Ties
    break by tensor order, then by lower flat index.
    base: the checkpoint, needed by magnitude for set tensors that carry no base values, and for a
    share where the delta does not record the size of its base.

    Extras and config stay. Tensors without entries go (not those of an adapter), and so do the support digests of tensors
    that lost entries. Provenance gains a line under "lineage". A budget that the delta already
    meets returns it unchanged.

    Raises BudgetError for a budget that cannot be read, ConfigError for an unknown `by`, DeltaError
    where an order or base value is missing, BaseMismatchError for another base. Takes O(nnz) time.
    """
    if by not in ("magnitude", "order"):
        raise ConfigError(f"cannot truncate by {by!r}; by is magnitude or order")
    checkpoint = _checked(delta, base)
    count = parse_budget(budget, _total_weights(delta, checkpoint))
    if count >= delta.nnz:
        return delta
    parts = [t for t in delta.tensors.values() if t.nnz]
    if by == "order":
        scores = [_earliness(t) for t in parts]
    else:
        scores = [_changes(t) for t in _with_base(parts, checkpoint)]
    keep = top(np.concatenate(scores), count)
    pieces = np.split(keep, np.cumsum([t.nnz for t in parts])[:-1])
    kept = [_take(t, piece) for t, piece in zip(parts, pieces, strict=True)]
    tensors = {t.name: t for t in kept if t.nnz}
    if delta.adapter is not None:  # whose tensors are all there, with entries or without
        tensors = {**delta.tensors, **{t.name: t for t in kept}}
    step = {"operation": "truncate", "budget": count, "by": by, "from": delta.nnz}
    return SparseDelta(
        tensors=tensors,
        extras=delta.extras,
        base=_identity(delta, tensors),
        config=delta.config,
        provenance={
            **delta.provenance,
            "lineage": [*delta.provenance.get("lineage", []), step],
        },
        adapter=delta.adapter,
    )


def top(scores: Array, count: int) -> Array:
    """Mask [n] of the `count` highest of `scores` [n] (no NaN); equal scores in order of position.

    O(n): one selection finds the lowest score that stays, and entries equal to it fill up.
    """
    if count <= 0:
        return np.zeros(scores.shape, bool)
    if count >= scores.size:
        return np.ones(scores.shape, bool)
    lowest = np.partition(scores, scores.size - count)[scores.size - count]
    keep = np.asarray(scores > lowest)
    equal = np.flatnonzero(scores == lowest)
    keep[equal[: count - np.count_nonzero(keep)]] = True
    return keep


def _earliness(tensor: TensorDelta) -> Array:
    """Score [nnz] of each entry by order: the earlier step is the higher."""
    if tensor.order is None:
        raise DeltaError(
            f"tensor {tensor.name!r} records no order of unmasking; truncate by magnitude instead"
        )
    return -tensor.order


def _changes(tensor: TensorDelta) -> Array:
    """Score [nnz] of each entry by magnitude, free of NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        size = tensor.magnitudes()
    if tensor.base_values is not None:
        odd = np.isnan(size)
        size[odd] = np.where(tensor.values[odd] == tensor.base_values[odd], 0.0, np.inf)
    return size


def _checked(delta: SparseDelta, base: str | Path | Checkpoint | None) -> Checkpoint | None:
    """The base, opened and proven to be the one that the delta belongs to."""
    if base is None:
        return None
    from deltakit.formats.checkpoint import Checkpoint
    from deltakit.identity import check_base

    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint(base)
    check_base(delta, checkpoint)
    return checkpoint


def _total_weights(delta: SparseDelta, checkpoint: Checkpoint | None) -> int | None:
    if delta.adapter is not None:
        return sum(tensor.numel for tensor in delta.tensors.values())
    if delta.base is not None and delta.base.total_weights is not None:
        return delta.base.total_weights
    return None if checkpoint is None else checkpoint.total_weights


def _with_base(parts: list[TensorDelta], checkpoint: Checkpoint | None) -> list[TensorDelta]:
    """The tensors, with base values read for the set tensors that carry none."""
    if checkpoint is None:
        return parts
    return [
        replace(t, base_values=checkpoint.gather(t.name, t.indices))
        if t.mode == "set" and t.base_values is None
        else t
        for t in parts
    ]


def _take(tensor: TensorDelta, keep: Array) -> TensorDelta:
    """The kept entries; the tensor itself, its generator included, where all of them stay."""
    return tensor if keep.all() else tensor.take(keep)


def _identity(delta: SparseDelta, kept: Mapping[str, TensorDelta]) -> BaseIdentity | None:
    """The base identity without digests of supports that are no more."""
    if delta.base is None:
        return None
    prints = {
        name: seen if kept[name] is delta.tensors[name] else replace(seen, support=None)
        for name, seen in delta.base.tensors.items()
        if name in kept
    }
    if delta.adapter is not None:  # those of the modules that it stands at
        prints |= {n: seen for n, seen in delta.base.tensors.items() if n not in delta.tensors}
    return replace(delta.base, tensors=prints)
