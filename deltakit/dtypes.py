"""Tensor dtypes: their names in torch, their codes in safetensors, their NumPy types.

NumPy has no bfloat16 or float8; `ml_dtypes` adds them as ordinary NumPy dtypes, with casts that
round to nearest even as torch does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from deltakit.errors import DeltaError, nearest

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class DType:
    """One tensor dtype.

    `name` is torch's name ("bfloat16"), `code` that of safetensors ("BF16"), `numpy` the NumPy
    dtype, `words` the unsigned integer of the same width that holds an element's raw bits, and
    `compute` the dtype in which additions are done (None where addition is not defined).
    """

    name: str
    code: str
    numpy: np.dtype[Any]
    words: np.dtype[Any]
    compute: np.dtype[Any] | None

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.numpy.itemsize

    @property
    def is_floating(self) -> bool:
        """Whether `add` deltas are defined for this dtype."""
        return self.compute is not None


def _dtype(name: str, code: str, scalar: Any, compute: Any = None) -> DType:
    numpy = np.dtype(scalar)
    words = np.dtype(f"<u{numpy.itemsize}")
    return DType(name, code, numpy, words, None if compute is None else np.dtype(compute))


_ALL = [
    _dtype("float64", "F64", np.float64, np.float64),
    _dtype("float32", "F32", np.float32, np.float32),
    _dtype("float16", "F16", np.float16, np.float32),
    _dtype("bfloat16", "BF16", ml_dtypes.bfloat16, np.float32),
    _dtype("float8_e4m3fn", "F8_E4M3", ml_dtypes.float8_e4m3fn),
    _dtype("float8_e5m2", "F8_E5M2", ml_dtypes.float8_e5m2),
    _dtype("int64", "I64", np.int64),
    _dtype("int32", "I32", np.int32),
    _dtype("int16", "I16", np.int16),
    _dtype("int8", "I8", np.int8),
    _dtype("uint64", "U64", np.uint64),
    _dtype("uint32", "U32", np.uint32),
    _dtype("uint16", "U16", np.uint16),
    _dtype("uint8", "U8", np.uint8),
    _dtype("bool", "BOOL", np.bool_),
]
DTYPES: dict[str, DType] = {d.name: d for d in _ALL}
BY_CODE: dict[str, DType] = {d.code: d for d in _ALL}
_BY_NUMPY: dict[np.dtype[Any], DType] = {d.numpy: d for d in _ALL}


def dtype(name: str) -> DType:
    """The dtype called `name` by torch ("bfloat16"); DeltaError when there is none."""
    try:
        return DTYPES[name]
    except KeyError:
        raise DeltaError(f"unknown dtype {name!r}{nearest(name, list(DTYPES))}") from None


def dtype_of(array: Array) -> DType:
    """The dtype of a NumPy array; DeltaError when safetensors has no such dtype."""
    try:
        return _BY_NUMPY[array.dtype.newbyteorder("=")]
    except KeyError:
        raise DeltaError(f"arrays of NumPy dtype {array.dtype} cannot be stored") from None


def add_exact(base: Array, terms: list[tuple[float, Array]]) -> Array:
    """Add weighted deltas to base values by deltakit's one merge arithmetic.

    base: [n] of a floating dtype; terms: (weight, values [n]) in the order of the merge.
    Everything is computed in float32 (float64 for float64 tensors) and never fused:
    s = 0; s = s + (weight * value) for each term; result = round(base + s) to the base's dtype,
    nearest even. The result has the base's dtype.
    """
    kind = dtype_of(base)
    if kind.compute is None:
        raise DeltaError(f"add is not defined for {kind.name} tensors; use set mode")
    scalar = kind.compute.type
    total = np.zeros(base.shape, kind.compute)
    for weight, values in terms:
        total = total + scalar(weight) * values.astype(kind.compute, copy=False)
    return np.asarray((base.astype(kind.compute) + total).astype(kind.numpy))
