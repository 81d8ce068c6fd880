"""Rows of a matrix in compressed sparse row form, found inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_of(starts: tl.tensor, entry: tl.tensor, rows: tl.tensor, steps: tl.constexpr) -> tl.tensor:
    """The row that holds each entry, int64: the last r with starts[r] <= entry, by bisection.

    starts: int32 [rows + 1]; entry: int64; steps: the bit length of `rows`. Rows may be empty.
    """
    low = entry * 0
    high = low + rows - 1
    for _ in range(steps):
        middle = (low + high + 1) // 2
        reached = tl.load(starts + middle).to(tl.int64) <= entry
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return low
