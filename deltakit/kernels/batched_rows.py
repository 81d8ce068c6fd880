"""y += S x for a batch whose rows have sparse matrices S of their own.

A program sums some output features of one row over some tokens, entry after entry in their order,
in float32 or wider. No atomics; what a row gets does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from deltakit.kernels.launch import launch

Entries = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

OUTPUTS, TOKENS = 32, 16  # of a program's tile


@triton.jit
def rows_kernel(
    x: tl.tensor,
    y: tl.tensor,
    tasks: tl.tensor,
    segments: tl.tensor,
    outs: tl.tensor,
    starts: tl.tensor,
    columns: tl.tensor,
    values: tl.tensor,
    tokens: tl.tensor,
    x_row: tl.tensor,
    x_token: tl.tensor,
    x_feature: tl.tensor,
    y_row: tl.tensor,
    y_token: tl.tensor,
    y_feature: tl.tensor,
    outputs: tl.constexpr,
    width: tl.constexpr,
) -> None:
    """y [rows, tokens, out] += S x [rows, tokens, in]; see `Packed` for the entries' arrays."""
    batch_row = tl.program_id(0).to(tl.int64)
    task = tl.load(tasks + batch_row)
    first = tl.load(segments + task)
    end = tl.load(segments + task + 1)
    segment = first + tl.program_id(1).to(tl.int64) * outputs + tl.arange(0, outputs)
    inside = segment < end
    out = tl.load(outs + segment, inside, 0)
    start = tl.load(starts + segment, inside, 0)
    count = tl.load(starts + segment + 1, inside, 0) - start
    token = tl.program_id(2).to(tl.int64) * width + tl.arange(0, width)
    real = token < tokens
    wide = y.dtype.element_ty
    total = tl.zeros((width, outputs), wide)
    taken = x + batch_row * x_row + token[:, None] * x_token
    for number in range(tl.max(count, 0)):
        mine = inside & (number < count)
        column = tl.load(columns + start + number, mine, 0)
        value = tl.load(values + start + number, mine, 0).to(wide)
        term = tl.load(taken + column[None, :] * x_feature, real[:, None] & mine[None, :], 0)
        total += term.to(wide) * value[None, :]
    at = y + batch_row * y_row + token[:, None] * y_token + out[None, :] * y_feature
    mask = real[:, None] & inside[None, :]
    tl.store(at, tl.load(at, mask) + total, mask)


@dataclass(frozen=True, eq=False)
class Packed:
    """The matrices of all tasks, each sorted by output feature.

    segments: int64 [tasks + 2], where each task's output features begin among all; outs: int64
    [features], which ones they are; starts: int64 [features + 1], where the entries of each begin;
    columns: int64 [nnz], the entries' input features; values: [nnz]. widest: the most output
    features of one task.
    """

    segments: torch.Tensor
    outs: torch.Tensor
    starts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor
    widest: int

    @classmethod
    def of(cls, entries: Mapping[int, Entries], tasks: int) -> Packed:
        """entries: task, from 1 to `tasks` -> output and input features int64 [n] and values [n]."""
        parts: list[tuple[torch.Tensor, ...]] = []
        sizes = [0] * (tasks + 1)
        for task in sorted(entries):
            out, column, value = entries[task]
            order = out.argsort(stable=True)
            outs, counts = torch.unique_consecutive(out[order], return_counts=True)
            parts.append((outs, counts, column[order], value[order]))
            sizes[task] = len(outs)
        outs, counts, columns, values = (torch.cat(each) for each in zip(*parts, strict=True))
        edges = torch.tensor([0, *sizes], device=outs.device).cumsum(0)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(edges, outs, starts, columns, values, max(sizes))

    def add(self, tasks: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        """y [rows, n, out] += S x for x [rows, n, in]; tasks: int64 [rows], 0 has no entries."""
        rows, tokens = x.shape[:2]
        blocks = triton.cdiv(self.widest, OUTPUTS), triton.cdiv(tokens, TOKENS)
        launch(
            rows_kernel,
            (rows, *blocks),
            x,
            y,
            tasks,
            self.segments,
            self.outs,
            self.starts,
            self.columns,
            self.values,
            tokens,
            *x.stride(),
            *y.stride(),
            fuse=True,
            outputs=OUTPUTS,
            width=TOKENS,
        )
