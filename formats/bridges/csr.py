"""Compressed sparse rows with 16-bit columns, as the spops kernels take them."""

from __future__ import annotations

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import FormatError


def flat_of_rows(name: str, shape: tuple[int, ...], offsets: Array, columns: Array) -> Array:
    """Flat row-major indices, int64 [nnz], of a matrix of `shape` in compressed sparse rows.

    offsets: int32 [rows + 1], from 0 to nnz, never falling. columns: [nnz]; int16 is read as
    unsigned, since the kernels' writers cast larger columns to it. Raises FormatError, naming the
    tensor, for anything else and for columns outside the matrix.
    """
    if len(shape) != 2 or offsets.shape != (shape[0] + 1,) or columns.ndim != 1:
        raise FormatError(
            f"tensor {name!r}: {list(offsets.shape)} row offsets and {list(columns.shape)} columns "
            f"do not fit a matrix of shape {list(shape)}"
        )
    if offsets.dtype.kind != "i" or columns.dtype.kind not in "iu":
        raise FormatError(
            f"tensor {name!r}: row offsets are {offsets.dtype} and columns {columns.dtype}, "
            "expected integers"
        )
    starts: Array = offsets.astype(np.int64)
    per_row = starts[1:] - starts[:-1]
    if offsets[0] != 0 or (per_row < 0).any() or offsets[-1] != columns.size:
        raise FormatError(
            f"tensor {name!r}: row offsets must rise from 0 to the {columns.size} columns, found "
            f"{offsets[0]} to {offsets[-1]}"
        )
    unsigned = columns.view(np.uint16) if columns.dtype == np.int16 else columns
    if unsigned.dtype == np.uint16 and shape[1] > 2**16:
        raise FormatError(
            f"tensor {name!r}: columns of 16 bits cannot tell {shape[1]} columns apart"
        )
    if columns.size and not 0 <= unsigned.min() <= unsigned.max() < shape[1]:
        raise FormatError(
            f"tensor {name!r}: columns lie between {unsigned.min()} and {unsigned.max()}, outside "
            f"shape {list(shape)}; is this the base that the file was made of?"
        )
    rows = np.repeat(np.arange(shape[0], dtype=np.int64), per_row)
    return np.asarray(rows * shape[1] + unsigned)
