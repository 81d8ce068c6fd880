"""Chosen entries of an embedding's gradient: sums over the tokens that looked their row up.

Tokens are sorted by row, stably, so that each entry's tokens stand together in their order; a
program sums some entries, in float32 (float64 for float64). No atomics, and the host learns no
counts, so it never waits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltakit.kernels.csr import row_of
from deltakit.kernels.launch import launch

ENTRIES, TOKENS = 32, 32  # of a program's tile


@triton.jit
def lookup_kernel(
    order: tl.tensor,
    bounds: tl.tensor,
    gradient: tl.tensor,
    starts: tl.tensor,
    columns: tl.tensor,
    total: tl.tensor,
    rows: tl.tensor,
    nnz: tl.tensor,
    stride_token: tl.tensor,
    stride_feature: tl.tensor,
    steps: tl.constexpr,
    entries: tl.constexpr,
    width: tl.constexpr,
) -> None:
    """total [nnz]: row r was looked up by the tokens order[bounds[r] : bounds[r + 1]]."""
    entry = tl.program_id(0).to(tl.int64) * entries + tl.arange(0, entries)
    inside = entry < nnz
    row = row_of(starts, entry, rows, steps)
    column = tl.load(columns + entry, inside, 0).to(tl.int64)
    first = tl.load(bounds + row, inside, 0)
    count = tl.load(bounds + row + 1, inside, 0) - first
    wide = total.dtype.element_ty
    kept = tl.zeros((entries, width), wide)
    for start in range(0, tl.max(count, 0), width):
        place = start + tl.arange(0, width)
        mask = inside[:, None] & (place[None, :] < count[:, None])
        token = tl.load(order + first[:, None] + place[None, :], mask, 0)
        taken = gradient + token * stride_token + column[:, None] * stride_feature
        kept += tl.load(taken, mask, 0).to(wide)
    tl.store(total + entry, tl.sum(kept, 1), inside)


def lookup(
    tokens: torch.Tensor,
    gradient: torch.Tensor,
    starts: torch.Tensor,
    columns: torch.Tensor,
    padding: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Entries of an embedding's gradient, [nnz], in `dtype` (float32 or float64).

    tokens: int64 [n], the rows looked up. gradient: [n, features]. starts: int32 [rows + 1],
    columns: int32 [nnz]. padding: the row that learns nothing, or -1.
    """
    rows, nnz = len(starts) - 1, len(columns)
    total = torch.zeros(nnz, dtype=dtype, device=gradient.device)
    if not nnz or not len(tokens):
        return total
    ids, order = tokens.masked_fill(tokens == padding, rows).sort(stable=True)
    bounds = torch.searchsorted(ids, torch.arange(rows + 1, device=ids.device))
    launch(
        lookup_kernel,
        (triton.cdiv(nnz, ENTRIES),),
        order,
        bounds,
        gradient,
        starts,
        columns,
        total,
        rows,
        nnz,
        *gradient.stride(),
        fuse=True,
        steps=rows.bit_length(),
        entries=ENTRIES,
        width=TOKENS,
    )
    return total
