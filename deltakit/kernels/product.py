"""The sampled gradient product: chosen entries of left^T @ right, summed over tokens.

A program sums some entries over a share of the tokens, a block of tokens at a time, in float32
(float64 for float64); shares are added in order. No atomics, so equal inputs give equal bits.

A gathered number costs the memory a sector of 32 bytes, a line of tokens costs what it holds. So
blocks of activations are transposed first, in their own dtype, unless entries are few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltakit.kernels.csr import row_of
from deltakit.kernels.launch import launch
from deltakit.kernels.turn import turned

ENTRIES, TOKENS = 16, 128  # of a program's tile
PROGRAMS = 1024  # that keep a device busy: below it tokens are shared out
TURNED = 2**24  # elements of one transposed block: 32 MiB in bfloat16
FEW = 8  # features per entry, above which transposing costs more than it saves (by the sectors)


@triton.jit
def product_kernel(
    left: tl.tensor,
    right: tl.tensor,
    starts: tl.tensor,
    columns: tl.tensor,
    total: tl.tensor,
    rows: tl.tensor,
    nnz: tl.tensor,
    tokens: tl.tensor,
    share: tl.tensor,
    left_token: tl.tensor,
    left_feature: tl.tensor,
    right_token: tl.tensor,
    right_feature: tl.tensor,
    steps: tl.constexpr,
    entries: tl.constexpr,
    width: tl.constexpr,
) -> None:
    """total [shares, nnz]: each entry's sum over `share` tokens; matrices by their strides."""
    entry = tl.program_id(0).to(tl.int64) * entries + tl.arange(0, entries)
    inside = entry < nnz
    row = row_of(starts, entry, rows, steps)
    column = tl.load(columns + entry, inside, 0).to(tl.int64)
    lefts = left + row[:, None] * left_feature
    rights = right + column[:, None] * right_feature
    number = tl.program_id(1).to(tl.int64)
    first = number * share
    end = tl.minimum(first + share, tokens)
    wide = total.dtype.element_ty
    kept = tl.zeros((entries, width), wide)
    for start in range(first, end, width):
        token = (start + tl.arange(0, width)).to(tl.int64)
        mask = inside[:, None] & (token < end)[None, :]
        a = tl.load(lefts + token[None, :] * left_token, mask, 0)
        b = tl.load(rights + token[None, :] * right_token, mask, 0)
        kept += a.to(wide) * b.to(wide)
    tl.store(total + number * nnz + entry, tl.sum(kept, 1), inside)


def product(
    left: torch.Tensor,
    right: torch.Tensor,
    starts: torch.Tensor,
    columns: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Entries of left^T @ right, [nnz], in `dtype` (float32 or float64), in row-major order.

    left: [n, rows], right: [n, columns], of any floating dtypes and strides. starts: int32
    [rows + 1], columns: int32 [nnz], the entries in compressed sparse row form.
    """
    rows, nnz = left.shape[1], len(columns)
    total = torch.zeros(nnz, dtype=dtype, device=left.device)
    if not nnz:
        return total
    features = rows + right.shape[1]
    few = FEW * nnz <= features
    length = max(1, len(left) if few else TURNED // max(left.shape[1], right.shape[1]))
    for a, b in zip(torch.split(left, length), torch.split(right, length), strict=True):
        if len(a):
            lines = (a, b) if few else (turned(a).t(), turned(b).t())
            total += _summed(lines[0], lines[1], starts, columns, dtype)
    return total


def _summed(
    left: torch.Tensor,
    right: torch.Tensor,
    starts: torch.Tensor,
    columns: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    (tokens, rows), nnz = left.shape, len(columns)
    programs = triton.cdiv(nnz, ENTRIES)
    shares = max(1, min(PROGRAMS // programs, tokens // (4 * TOKENS)))
    share = triton.cdiv(triton.cdiv(tokens, shares), TOKENS) * TOKENS
    shares = triton.cdiv(tokens, share)
    parts = torch.empty(shares, nnz, dtype=dtype, device=left.device)
    launch(
        product_kernel,
        (programs, shares),
        left,
        right,
        starts,
        columns,
        parts,
        rows,
        nnz,
        tokens,
        share,
        *left.stride(),
        *right.stride(),
        fuse=True,
        steps=rows.bit_length(),
        entries=ENTRIES,
        width=TOKENS,
    )
    return parts[0] if shares == 1 else parts.sum(0)
