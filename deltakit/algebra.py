"""Deltas of deltas: sums, multiples, differences and parts of them, exactly.

Sums and multiples follow the arithmetic of merging (float32, never fused; float64 for float64
tensors), so merging `add(a, b)` equals merging `[a, b]`, and merging `scale(a, w)` equals merging
`a` with weight w, bit for bit. Extras and configuration changes follow its rules too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from deltakit.adapters.initial import STORED
from deltakit.adapters.refusal import MERGE, refuse_adapters, require_one_adapter
from deltakit.comparing.base_agreement import base_of, require_one_base
from deltakit.delta import SparseDelta, TensorDelta
from deltakit.differences import changes_of, proven_differences
from deltakit.dtypes import Array
from deltakit.errors import ConfigError, DeltaError
from deltakit.merging.inputs import common_config, common_extras, read_inputs
from deltakit.supports import shared, union
from deltakit.targets.patterns import matching


def add(one: SparseDelta, other: SparseDelta) -> SparseDelta:
    """The delta that does what both do: 0 + v1 + v2 on the union of the supports.

    Set tensors that meet set tensors stay set: their bits must agree where both have an entry. A
    set tensor that meets an add tensor becomes add by its recorded base values, where that gives
    its bits back. Extras and configuration changes must agree. Order stays for tensors that only
    one delta touches.

    Raises BaseMismatchError for deltas of different bases and DeltaError for deltas that
    contradict each other.
    """
    refuse_adapters((one.adapter, other.adapter), "adding", MERGE)
    require_one_base(one, other)
    tensors = dict(one.tensors)
    for name, theirs in other.tensors.items():
        tensors[name] = _sum(tensors[name], theirs) if name in tensors else theirs
    inputs = read_inputs([one, other])
    return SparseDelta(
        tensors=tensors,
        extras=common_extras(inputs, None),
        base=base_of(tensors, one, other),
        config=common_config(inputs, None),
        provenance={"operation": "add", "of": [*_terms(one), *_terms(other)]},
    )


def scale(delta: SparseDelta, weight: float) -> SparseDelta:
    """The delta with every change multiplied by `weight`, rounded to float32 (or float64) first.

    The support stays, and so do extras and configuration, to which weights do not apply. Weight 1
    gives the delta itself. With another weight set tensors become add, from their recorded base
    values. Raises ConfigError for a weight that is not finite and DeltaError for set tensors
    without base values, without arithmetic (float8, integers) or with a change that is not finite,
    and for values that become too large.
    """
    weight = float(weight)
    if not math.isfinite(weight):
        raise ConfigError(f"weight {weight} is not finite")
    if weight == 1:
        return delta
    refuse_adapters([delta.adapter], "scaling", MERGE)
    tensors = {name: _scaled(tensor, weight) for name, tensor in delta.tensors.items()}
    return _derived(delta, tensors, {"operation": "scale", "weight": weight})


def subtract(one: SparseDelta, other: SparseDelta) -> SparseDelta:
    """The delta `one` without what `other` does: 0 + v1 + (-1 * v2).

    Entries of `other` where exactly nothing is left leave the support, so subtracting what was
    added gives the delta back wherever the sums are exact in float32. Extras and configuration are
    those of `one`. Raises as `add` and `scale` do.
    """
    refuse_adapters((one.adapter, other.adapter), "subtracting", MERGE)
    require_one_base(one, other)
    tensors = dict(one.tensors)
    for name, theirs in other.tensors.items():
        negated = _scaled(theirs, -1.0)
        left = _sum(tensors[name], negated) if name in tensors else negated
        stays = left.values != 0
        stays[~_held(left.indices, theirs.indices)] = True
        tensors[name] = left if stays.all() else left.take(stays)
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.nnz}
    return SparseDelta(
        tensors=tensors,
        extras=one.extras,
        base=base_of(tensors, one, other),
        config=one.config,
        provenance={"operation": "subtract", "of": [dict(one.provenance), dict(other.provenance)]},
    )


def intersect(delta: SparseDelta, *others: SparseDelta) -> SparseDelta:
    """The entries of `delta`, with its values, that all the others have too.

    Tensors without entries go, except those of an adapter; extras and configuration of `delta` stay. Raises BaseMismatchError
    for deltas of different bases.
    """
    tensors = dict(delta.tensors)
    for other in others:
        require_one_adapter(delta.adapter, other.adapter)
        require_one_base(delta, other)
        tensors = _within(tensors, other)
    step = {"operation": "intersect", "with": [dict(other.provenance) for other in others]}
    return _derived(delta, tensors, step)


def restrict(
    delta: SparseDelta,
    tensors: str | Iterable[str] | None = None,
    support: SparseDelta | None = None,
) -> SparseDelta:
    """The part of `delta` in some tensors, at the entries of another delta, or both.

    tensors: shell patterns ("*.query.weight") or whole parts of dotted names ("encoder.layer.0");
    None takes all. They choose among extras too, and configuration changes go with the last extra.
    support: a delta whose entries, whatever their values, are those that may stay.
    Tensors of an adapter that are not chosen have their initial values.
    Raises ConfigError for a pattern that matches nothing and BaseMismatchError for different bases.
    """
    names = [*delta.tensors, *delta.extras]
    patterns = [tensors] if isinstance(tensors, str) else None if tensors is None else [*tensors]
    chosen = matching(patterns, dict.fromkeys(names), "pattern")
    made = {name: tensor for name, tensor in delta.tensors.items() if name in chosen}
    kept = set() if delta.adapter is None else {STORED + name for name in delta.tensors}
    extras = {name: array for name, array in delta.extras.items() if name in chosen or name in kept}
    step: dict[str, Any] = {"operation": "restrict"}
    if patterns is not None:
        step["tensors"] = patterns
    if support is not None:
        require_one_adapter(delta.adapter, support.adapter)
        require_one_base(delta, support)
        made = _within(made, support)
        step["support"] = dict(support.provenance)
    config = delta.config if extras or not delta.extras else {}
    return replace(_derived(delta, made, step), extras=extras, config=config)


def _derived(
    delta: SparseDelta, tensors: Mapping[str, TensorDelta], step: Mapping[str, Any]
) -> SparseDelta:
    """`delta` with other tensors, and the step from it at the end of its lineage."""
    if delta.adapter is not None:  # whose tensors are all there, with entries or without
        empty = {name: tensor.take(np.empty(0, int)) for name, tensor in delta.tensors.items()}
        tensors = {**empty, **tensors}
    lineage = [*delta.provenance.get("lineage", []), {**step, "from": delta.nnz}]
    return replace(
        delta,
        tensors=tensors,
        base=base_of(tensors, delta),
        provenance={**delta.provenance, "lineage": lineage},
    )


def _terms(delta: SparseDelta) -> list[dict[str, Any]]:
    """The provenance of each term of a sum, so that sums of sums do not nest."""
    if set(delta.provenance) == {"operation", "of"} and delta.provenance["operation"] == "add":
        return list(delta.provenance["of"])
    return [dict(delta.provenance)]


def _sum(one: TensorDelta, other: TensorDelta) -> TensorDelta:
    indices = union(one.indices, other.indices)
    places = indices.searchsorted(one.indices), indices.searchsorted(other.indices)
    if one.mode == other.mode == "set":
        _require_equal_bits(one, other)
        values = _joined(places, (one.values, other.values), len(indices))
    else:
        one, other = _as_add(one), _as_add(other)
        values = np.zeros(len(indices), one.values.dtype)
        for place, each in zip(places, (one, other), strict=True):  # ((0 + v1) + v2), as merging
            with np.errstate(over="ignore"):  # what is too large is refused by TensorDelta
                values[place] += each.values
    base = None
    if one.base_values is not None and other.base_values is not None:
        base = _joined(places, (one.base_values, other.base_values), len(indices))
    same = len(indices) == one.nnz == other.nnz
    return replace(
        one,
        indices=indices,
        values=values,
        base_values=base,
        order=None,
        seed=one.seed if same and one.seed == other.seed else None,
    )


def _require_equal_bits(one: TensorDelta, other: TensorDelta) -> None:
    mine, theirs = shared(one.indices, other.indices)
    clash = one.values[mine] != other.values[theirs]
    if clash.any():
        raise DeltaError(
            f"tensor {one.name!r}: {int(clash.sum())} entries are set to different values by the "
            f"two deltas (such as index {one.indices[mine][clash][0]}); rebase one of them to add "
            "mode to add up the changes"
        )


def _joined(places: tuple[Array, Array], columns: tuple[Array, Array], count: int) -> Array:
    """Two columns on the union of the supports, [count]; the first one's where both stand."""
    made = np.empty(count, columns[0].dtype)
    made[places[1]] = columns[1]
    made[places[0]] = columns[0]
    return made


def _as_add(tensor: TensorDelta) -> TensorDelta:
    """The tensor in add mode, proven to give the same bits back."""
    if tensor.mode == "add":
        return tensor
    values = None
    if tensor.base_values is not None:
        values = proven_differences(tensor.base_values, tensor.values, tensor.kind)
    if values is None:
        raise DeltaError(
            f"tensor {tensor.name!r} is in set mode in one delta and in add mode in the other, and "
            "its recorded base values do not give its bits back as base + difference; rebase the "
            "other delta to set mode"
        )
    return replace(tensor, mode="add", values=values)


def _scaled(tensor: TensorDelta, weight: float) -> TensorDelta:
    changes = changes_of(tensor)
    if changes is None or tensor.kind.compute is None:
        reason = "carries no base values" if changes is None else f"is {tensor.dtype}"
        raise DeltaError(
            f"tensor {tensor.name!r} is in set mode and {reason}, so its changes cannot be "
            "multiplied; rebase it to add mode where its dtype has sums"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # refused by TensorDelta
        values = tensor.kind.compute.type(weight) * changes
    return replace(tensor, mode="add", values=values)


def _within(tensors: Mapping[str, TensorDelta], other: SparseDelta) -> dict[str, TensorDelta]:
    """The entries that `other` has too; a tensor that keeps all of them stays as it is."""
    made = {}
    for name, tensor in tensors.items():
        if name in other.tensors:
            keep = _held(tensor.indices, other.tensors[name].indices)
            if keep.any():
                made[name] = tensor if keep.all() else tensor.take(keep)
    return made


def _held(indices: Array, by: Array) -> Array:
    """Which of `indices` stand in `by` too, bool [len(indices)]."""
    mask = np.zeros(len(indices), bool)
    mask[shared(indices, by)[0]] = True
    return mask
