"""The transpose of a matrix by tiles, so that both sides read and write whole lines."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltakit.kernels.launch import launch

TILE = 64
LINE = 16  # elements: lines are multiples of it, so that they are read in vectors


@triton.jit
def turn_kernel(
    source: tl.tensor,
    target: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    line: tl.tensor,
    tile: tl.constexpr,
) -> None:
    """source [height, width], by strides `row` and `column`, as contiguous target [width, line]."""
    y = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    x = tl.program_id(1).to(tl.int64) * tile + tl.arange(0, tile)
    inside = (y < height)[:, None] & (x < width)[None, :]
    part = tl.load(source + y[:, None] * row + x[None, :] * column, inside, 0)
    within = (x < width)[:, None] & (y < line)[None, :]
    tl.store(target + x[:, None] * line + y[None, :], tl.trans(part), within)


def turned(matrix: torch.Tensor) -> torch.Tensor:
    """The transpose of a matrix [n, features], with zeros behind: [features, n rounded up to LINE]."""
    height, width = matrix.shape
    line = triton.cdiv(height, LINE) * LINE
    made = matrix.new_empty(width, line)
    grid = (triton.cdiv(line, TILE), triton.cdiv(width, TILE))
    sizes = (height, width, *matrix.stride(), line)
    launch(turn_kernel, grid, matrix, made, *sizes, fuse=False, tile=TILE)
    return made
