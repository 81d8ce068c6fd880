"""The elements of an array that reach a bound, in order, without a mask or a copy of the array.

Two passes: blocks count what reaches the bound; once counts are added up every block knows where
its finds belong, so they stand in ascending order whichever block is done first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltakit.kernels.launch import launch

BLOCK = 2048


@triton.jit
def count_kernel(
    values: tl.tensor, bound: tl.tensor, counts: tl.tensor, size: tl.tensor, block: tl.constexpr
) -> None:
    """counts [blocks]: how many of a block's |values| are `bound` or more."""
    number = tl.program_id(0).to(tl.int64)
    at = number * block + tl.arange(0, block)
    value = tl.load(values + at, at < size, float("nan"))
    tl.store(counts + number, tl.sum((tl.abs(value) >= bound).to(tl.int32), 0))


@triton.jit
def take_kernel(
    values: tl.tensor,
    bound: tl.tensor,
    ends: tl.tensor,
    indices: tl.tensor,
    found: tl.tensor,
    size: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Write a block's finds behind those of the blocks before it; ends: running sums of counts."""
    number = tl.program_id(0).to(tl.int64)
    at = number * block + tl.arange(0, block)
    value = tl.load(values + at, at < size, float("nan"))
    reached = tl.abs(value) >= bound
    before = tl.cumsum(reached.to(tl.int32), 0)
    place = tl.load(ends + number) - tl.sum(reached.to(tl.int32), 0) + before - 1
    tl.store(indices + place, at, reached)
    tl.store(found + place, value, reached)


def at_least(values: torch.Tensor, bound: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(index, value) of all elements of values [n], float32 and contiguous, with |v| >= bound.

    index: int64, ascending. The bound is compared as float32; NaN reaches none. The host waits
    for the number of finds, once.
    """
    size = len(values)
    blocks = triton.cdiv(size, BLOCK)
    counts = torch.zeros(blocks, dtype=torch.int64, device=values.device)
    if not size:
        return counts, values
    launch(count_kernel, (blocks,), values, bound, counts, size, fuse=False, block=BLOCK)
    ends = counts.cumsum(0)
    indices = torch.empty(int(ends[-1]), dtype=torch.int64, device=values.device)
    found = values.new_empty(len(indices))
    finds = (ends, indices, found)
    launch(take_kernel, (blocks,), values, bound, *finds, size, fuse=False, block=BLOCK)
    return indices, found
