"""The transpose of a matrix by tiles, so that both sides read and write whole lines."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltakit.kernels.launch import launch

TILE = 64


@triton.jit
def turn_kernel(
    source: tl.tensor,
    target: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    tile: tl.constexpr,
) -> None:
    """source [height, width], by strides `row` and `column`, as contiguous target [width, height]."""
    y = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    x = tl.program_id(1).to(tl.int64) * tile + tl.arange(0, tile)
    inside = (y < height)[:, None] & (x < width)[None, :]
    part = tl.load(source + y[:, None] * row + x[None, :] * column, inside)
    tl.store(target + x[:, None] * height + y[None, :], tl.trans(part), tl.trans(inside))


def turned(matrix: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of the transpose of a matrix [n, features], in its dtype."""
    height, width = matrix.shape
    made = matrix.new_empty(width, height)
    grid = (triton.cdiv(height, TILE), triton.cdiv(width, TILE))
    launch(turn_kernel, grid, matrix, made, height, width, *matrix.stride(), fuse=False, tile=TILE)
    return made
