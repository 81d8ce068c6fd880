"""Writing entries through to one tensor: gather, add, round and scatter in one pass.

The arithmetic is that of merging, to the bit: base + (value + 0.0), never fused, rounded once to
the nearest, ties to even.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltakit.kernels.launch import launch

BLOCK = 512


@triton.jit
def bfloat16_of(x: tl.tensor) -> tl.tensor:
    """float32 to bfloat16, to the nearest, ties to even: on every device, and interpreted too."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return (
        tl.where((bits & 0x7FFFFFFF) <= 0x7F800000, rounded, 0x7FC0)
        .to(tl.uint16)
        .to(tl.bfloat16, bitcast=True)
    )


@triton.jit
def write_kernel(
    weight: tl.tensor,
    index: tl.tensor,
    slot: tl.tensor,
    base: tl.tensor,
    value: tl.tensor,
    count: tl.tensor,
    block: tl.constexpr,
) -> None:
    """weight[index] = round(base[slot] + (value[slot] + 0.0)); indices do not repeat."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    place = tl.load(slot + at, inside, 0)
    merged = tl.load(base + place, inside) + (tl.load(value + place, inside) + 0.0)
    if weight.dtype.element_ty == tl.bfloat16:
        rounded = bfloat16_of(merged)
    else:
        rounded = merged.to(weight.dtype.element_ty)
    tl.store(weight + tl.load(index + at, inside, 0), rounded, inside)


def write_through(
    weight: torch.Tensor,
    indices: torch.Tensor,
    slots: torch.Tensor,
    base: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Set weight[indices] to round(base[slots] + (values[slots] + 0.0)).

    weight: flat, bfloat16, float16, float32 or float64. indices, slots: int64 [n], no index twice.
    base, values: float32 (float64 for a float64 weight), contiguous. All on one device.
    """
    count = len(indices)
    if count:
        grid = (triton.cdiv(count, BLOCK),)
        arguments = (weight, indices, slots, base, values, count)
        launch(write_kernel, grid, *arguments, fuse=False, block=BLOCK)
