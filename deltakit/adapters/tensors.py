"""The tensors of an adapter in a model, by the names that deltas give them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from deltakit.adapter import Adapter
from deltakit.adapters.building import Injection
from deltakit.adapters.initial import Computed, initial_values
from deltakit.delta import SparseDelta, in_tensor_order
from deltakit.dtypes import Array, dtype
from deltakit.errors import CoordinateError
from deltakit.live.arrays import dtype_name, to_numpy, to_torch


def owner_of(tensor: str) -> str:
    """The module in a tensor's name."""
    return tensor.rpartition(".")[0]


def by_tensor_name(
    injection: Injection, modules: Mapping[str, str]
) -> dict[str, torch.nn.Parameter]:
    """An adapter's tensors by the names that a delta gives them, in tensor order.

    modules: live name of a module -> the base's name of its weight.
    """
    return in_tensor_order(
        {
            f"{owner_of(modules[live])}.{parameter}": tensor
            for live, parameters in injection.parameters.items()
            for parameter, tensor in parameters.items()
        }
    )


def initial_of(
    adapter: Adapter, name: str, parameter: torch.nn.Parameter, computed: Computed
) -> Array:
    """Initial values of a tensor by its rule, in its shape and dtype."""
    module, part = adapter.split(name)
    ((how, value),) = (rule := adapter.initial[part]).items()
    if how == "stored":  # what the builder put there
        return to_numpy(parameter)
    shape, kind = tuple(parameter.shape), dtype_name(parameter)
    if how == "computed":
        return np.asarray(computed(module, value, shape).astype(dtype(kind).numpy))
    return initial_values(rule, name, shape, kind, adapter.seed)


def check_tensors(named: Mapping[str, torch.nn.Parameter], delta: SparseDelta) -> None:
    """Raise CoordinateError unless the adapter in the model has the delta's tensors."""
    for name in {**named, **delta.tensors}:
        there = tuple(named[name].shape) if name in named else None
        given = delta.tensors[name].shape if name in delta.tensors else None
        if there != given:
            raise CoordinateError(
                f"adapter tensor {name!r} is {_shape(given)} in the delta and {_shape(there)} in the "
                "model; was it made for another model or version of peft?"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"


@torch.no_grad()
def fill(named: Mapping[str, torch.nn.Parameter], values: Mapping[str, Array]) -> None:
    """Copy values into an adapter's tensors."""
    for name, parameter in named.items():
        parameter.copy_(to_torch(values[name]))
