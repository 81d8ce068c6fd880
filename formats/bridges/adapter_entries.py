"""The values of an adapter as entries of a delta: what differs from initial values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deltakit.adapter import Adapter
from deltakit.adapters.initial import check_value, initial_values
from deltakit.delta import TensorDelta
from deltakit.dtypes import Array, dtype_of
from deltakit.errors import FormatError

_CONSTANTS = (0.0, 1.0)  # the first, where both leave as many entries


def check_floats(values: Mapping[str, Array]) -> None:
    """Raise FormatError unless all values, by name of their tensor, are finite floats."""
    for name, array in values.items():
        if dtype_of(array).compute is None:
            raise FormatError(f"tensor {name!r} is {dtype_of(array).name}, expected floats")
        if not np.isfinite(array.astype(np.float64)).all():
            raise FormatError(f"tensor {name!r} holds values that are not finite")


def from_constants(
    kind: str, config: Mapping[str, Any], values: Mapping[str, Array], parameters: Mapping[str, str]
) -> tuple[Adapter, dict[str, TensorDelta]]:
    """An adapter of constant initial values, and its tensors.

    values: name of a tensor -> finite floats; parameters: its name -> the parameter that it is. Each
    parameter starts from 0, or from 1 where that leaves fewer entries; elements that are so already
    are no entries. All values come back bit for bit but for the sign of zeros: -0.0, which masking
    by a product leaves behind, becomes 0.0 and costs nothing.
    """
    initial: dict[str, dict[str, Any]] = {}
    tensors: dict[str, TensorDelta] = {}
    for parameter in sorted(set(parameters.values())):
        mine = {name: array for name, array in values.items() if parameters[name] == parameter}
        made = {constant: _beyond(constant, mine) for constant in _CONSTANTS}
        best = min(made, key=lambda constant: _cost(made[constant], mine))
        initial[parameter] = {"constant": best}
        tensors |= made[best]
    starts = {
        name: initial_values(initial[parameters[name]], name, array.shape, dtype_of(array).name, 0)
        for name, array in values.items()
    }
    check = check_value(kind, config, starts)
    return Adapter(kind=kind, config=config, seed=0, initial=initial, check=check), tensors


def _beyond(constant: float, values: Mapping[str, Array]) -> dict[str, TensorDelta]:
    found = {n: entries_beyond(n, a, np.full_like(a, constant)) for n, a in values.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _cost(made: Mapping[str, TensorDelta], values: Mapping[str, Array]) -> tuple[bool, int]:
    """Whether a tensor is missing, as no differences give its values, and all entries."""
    return len(made) < len(values), sum(tensor.nnz for tensor in made.values())


def entries_beyond(name: str, values: Array, initial: Array) -> TensorDelta | None:
    """Entries that make `values` out of `initial`, bit for bit but for the sign of zeros; None where
    no difference does.

    values, initial: of one float dtype and shape.
    """
    kind = dtype_of(values)
    old, new = (array.reshape(-1).astype(kind.compute) for array in (initial, values))
    at = np.flatnonzero(old != new)
    differences = new[at] - old[at]
    if not np.array_equal((old[at] + differences).astype(kind.numpy), values.reshape(-1)[at]):
        return None
    return _tensor(name, values, at, differences)


def without_entries(name: str, values: Array) -> TensorDelta:
    """The tensor of `values` with no entry."""
    return _tensor(name, values, np.zeros(0, np.int64), np.zeros(0, dtype_of(values).compute))


def _tensor(name: str, values: Array, indices: Array, differences: Array) -> TensorDelta:
    kind = dtype_of(values).name
    return TensorDelta(
        name=name, shape=values.shape, dtype=kind, mode="add", indices=indices, values=differences
    )
