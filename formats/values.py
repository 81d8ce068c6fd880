"""The streams beside the indices: values, base values and the order of unmasking."""

from __future__ import annotations

import numpy as np

from deltakit.delta import TensorDelta
from deltakit.dtypes import DTYPES, Array, DType
from deltakit.errors import ConfigError, DeltaError, FormatError
from deltakit.formats import bits

WIDTHS = ("float32", "bfloat16", "float16")  # what `add` values may be stored as on request


def value_dtype(tensor: TensorDelta, values: str | None) -> DType:
    """The dtype in which the values of `tensor` are stored when `values` is asked for.

    None asks for the dtype they are computed in. Raises ConfigError for a dtype that is not one
    of `WIDTHS`.
    """
    if values is not None and values not in WIDTHS:
        raise ConfigError(f"values cannot be stored as {values!r}; known: {', '.join(WIDTHS)}")
    if tensor.mode == "set":
        return tensor.kind
    return DTYPES[values or str(tensor.values.dtype)]


def encode_values(tensor: TensorDelta, kind: DType) -> bytes:
    """The values of `tensor`, little-endian: raw bits for set, rounded to `kind` for add.

    Rounding is to nearest, ties to even. Raises DeltaError for a value that becomes infinite.
    """
    if tensor.mode == "set":
        return tensor.values.astype(tensor.kind.words, copy=False).tobytes()
    given = tensor.values
    if given.dtype == np.float64 and kind.name == "bfloat16":
        given = _to_odd_float32(given)  # the cast would pass through float32 and round twice
    with np.errstate(over="ignore"):
        rounded = given.astype(kind.numpy)
    infinite = ~np.isfinite(rounded)
    if infinite.any():
        at = int(np.flatnonzero(infinite)[0])
        raise DeltaError(
            f"tensor {tensor.name!r}: value {tensor.values[at]} at index {tensor.indices[at]} "
            f"is too large for {kind.name}; store the values as float32"
        )
    return rounded.view(kind.words).tobytes()


def decode_values(data: bytes, kind: DType, tensor_kind: DType, mode: str, where: str) -> Array:
    """The values that `encode_values` wrote, as `TensorDelta` wants them, [nnz].

    Raises FormatError for add values that are not finite.
    """
    words = np.frombuffer(data, kind.words)
    if mode == "set":
        return words.copy()
    stored = words.view(kind.numpy)
    finite = np.isfinite(stored)
    if not finite.all():
        at = int(np.flatnonzero(~finite)[0])
        raise FormatError(f"{where}: value {stored[at]} of entry {at} is not finite")
    return np.asarray(stored.astype(tensor_kind.compute))


def order_width(order: Array) -> int:
    """Bits per entry of the order stream: as many as the largest step has."""
    return int(order.max()).bit_length() if len(order) else 0


def decode_order(data: bytes, count: int, width: int, where: str) -> Array:
    """The steps of an order stream, int64 [count]; FormatError for a width that is too large."""
    order = bits.unpack(data, count, width, f"{where}: order")
    if order_width(order) != width:
        raise FormatError(
            f"{where}: order is written in {width} bits, its largest step has {order_width(order)}"
        )
    return order


def _to_odd_float32(values: Array) -> Array:
    """float64 to float32 so that a further rounding gives the correctly rounded result.

    Inexact values are cut towards zero and their last bit is set, which keeps them off every tie
    of the narrower dtype (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums",
    2008).
    """
    with np.errstate(over="ignore", under="ignore"):
        near = values.astype(np.float32)
    wide = near.astype(np.float64)
    cut = np.where(np.abs(wide) > np.abs(values), np.nextafter(near, np.float32(0)), near)
    odd = cut.view(np.uint32) | (wide != values).astype(np.uint32)
    return np.asarray(odd.view(np.float32))
