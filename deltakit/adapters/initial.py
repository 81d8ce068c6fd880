"""The values that an adapter starts from, made of a seed by integers and one rounding.

A `uniform` value is the odd integer 2w + 1 - 2^24, w being the top 24 bits of a word of Philox (see
`deltakit.formats.seeded`), times float32(b / 2^24), rounded to float32 once and then to the tensor's
dtype. The integer is exact in float32, so every platform gets the same bits; the values lie evenly
and symmetrically within (-b, b) and are never 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from math import prod, sqrt
from typing import Any

import numpy as np

from deltakit.adapter import FAN_IN
from deltakit.delta import SparseDelta, in_tensor_order
from deltakit.dtypes import Array, dtype
from deltakit.errors import BaseMismatchError, DeltaError
from deltakit.formats import strict_json
from deltakit.formats.seeded import philox_words
from deltakit.merging.arithmetic import Contribution, merged_words

STORED = "adapter.initial."  # beginning of the names of extras that hold initial values
_STREAM = "adapter initial values"
_BITS = 24  # of a float32's significand

Computed = Callable[[str, str, tuple[int, ...]], Array]


def initial_values(
    rule: Mapping[str, Any], name: str, shape: tuple[int, ...], dtype_name: str, seed: int
) -> Array:
    """The initial values that a `constant` or `uniform` rule gives one tensor, `shape`, `dtype_name`.

    name: of the tensor; each has its own draws.
    """
    kind = dtype(dtype_name)
    ((how, value),) = rule.items()
    if how == "constant":
        return np.full(shape, value, np.float64).astype(kind.numpy)
    if how != "uniform":
        raise DeltaError(f"tensor {name!r}: a seed does not give initial values that are {how}")
    bound = 1 / sqrt(prod(shape[1:])) if value == FAN_IN else float(value)
    words = philox_words(seed, name, prod(shape), _STREAM) >> np.uint64(64 - _BITS)
    odd = (2 * words.astype(np.int64) + (1 - 2**_BITS)).astype(np.float32)
    drawn = odd * np.float32(bound / 2**_BITS)
    return np.asarray(drawn.reshape(shape).astype(kind.numpy))


def all_initial_values(delta: SparseDelta, computed: Computed | None = None) -> dict[str, Array]:
    """Name -> initial values of every tensor of an adapter delta, proven by its check value.

    computed: gives the values of (module, how, shape) for `computed` rules, in float32. Raises
    DeltaError for a delta of no adapter or without the values that it needs, and BaseMismatchError
    where the values are not those that the delta was trained from.
    """
    adapter = delta.adapter
    if adapter is None:
        raise DeltaError("the delta is one of base weights, not of an adapter")
    values = {}
    for name, tensor in delta.tensors.items():
        module, parameter = adapter.split(name)
        ((how, value),) = (rule := adapter.initial[parameter]).items()
        if how == "stored":
            values[name] = _stored(delta, name, tensor.shape)
        elif how == "computed":
            if computed is None:
                raise DeltaError(f"tensor {name!r}: its initial values need the base; give it")
            given = computed(module, value, tensor.shape)
            values[name] = given.astype(tensor.kind.numpy)
        else:
            values[name] = initial_values(rule, name, tensor.shape, tensor.dtype, adapter.seed)
    found = check_value(adapter.kind, adapter.config, values)
    if found != adapter.check:
        raise BaseMismatchError(
            f"adapter {adapter.kind!r}: its seed, configuration and tensors rebuild other initial "
            f"values than it was trained from (check value {found}, recorded {adapter.check}); the "
            "file is damaged, or its adapter depends on another base"
        )
    return values


def check_value(kind: str, config: Mapping[str, Any], initial: Mapping[str, Array]) -> str:
    """16 hexadecimal digits of a digest of an adapter before training.

    initial: name -> initial values of all tensors.
    """
    digest = hashlib.sha256(strict_json.dumps([kind, dict(config)]).encode("ascii"))
    for name, array in in_tensor_order(initial).items():
        shape = "x".join(str(n) for n in array.shape)
        digest.update(f"\0{name}\0{array.dtype.name}\0{shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def trained_values(delta: SparseDelta, computed: Computed | None = None) -> dict[str, Array]:
    """Name -> values of every tensor of an adapter delta: the initial ones with its entries merged.

    computed and errors as for `all_initial_values`.
    """
    return with_entries(delta, all_initial_values(delta, computed))


def with_entries(delta: SparseDelta, initial: Mapping[str, Array]) -> dict[str, Array]:
    """Initial values of all tensors with the delta's entries merged into copies of them."""
    values = {name: initial[name].copy() for name in delta.tensors}
    for name, tensor in delta.tensors.items():
        words = values[name].reshape(-1).view(tensor.kind.words)
        entries = [Contribution(1.0, tensor)]
        words[tensor.indices] = merged_words(
            words[tensor.indices], tensor.indices, entries, tensor.kind
        )
    return values


def _stored(delta: SparseDelta, name: str, shape: tuple[int, ...]) -> Array:
    array = delta.extras.get(STORED + name)
    if array is None or array.shape != shape:
        raise DeltaError(f"tensor {name!r}: the delta lacks its initial values among the extras")
    return np.array(array)
