"""Linear layers whose rows have sparse changes of their own: y = Wx + b, and S x + c by row.

The base layer does its own work first, on weights of any kind, quantised ones too. A task with few
entries takes part in one gather, multiplication and scatter over all rows; one with many has a
sparse matrix of its own, whose product pays two transpositions of activations. The crossover was
measured on a prototype, one CPU thread, 16 x 64 tokens, float32: 4.3 ns per entry and token against
3 ns per feature and token (layers of 1024 features; at 1 % density 64 ms against 8 ms). Where
Triton's kernels work (`kernels.dispatch`) one of them takes all tasks together.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from deltakit.kernels.dispatch import by_triton, runs_ahead
from deltakit.mixed.changes import Change
from deltakit.mixed.rows import Rows, select

BUFFER = 2**18  # elements gathered at once: 1 MiB in float32 stays in the cache
GATHERED = 0.7  # of a layer's input and output features: entries up to which a task is gathered
SCATTERED = 0.125  # of a bias: up to this share its columns are added to one by one


Entries = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # output, input features, values: [n]


class BatchedLinear:
    """Forward hook of a linear layer.

    weights, biases: task -> its change of the weight [out, in] (or [in, out] if `transposed`) and
    of the bias [out]. shape: (out, in).
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        weights: Mapping[int, Change],
        biases: Mapping[int, Change],
        tasks: int,
        *,
        transposed: bool,
    ) -> None:
        self.name = name
        self._products: dict[int, torch.Tensor] = {}
        light: dict[int, Entries] = {}
        packs = any(by_triton(change.difference) for change in weights.values())
        for task, change in weights.items():
            out, column = _coordinates(change.indices, shape, transposed=transposed)
            if packs or len(out) <= GATHERED * sum(shape):
                light[task] = out, column, change.difference
            else:
                self._products[task] = _compressed(out, column, change.difference, shape)
        self._together: _Packed | _Gathered | None = None
        if light:
            self._together = (_Packed if packs else _Gathered)(light, tasks)
        self._bias = _Bias(biases, shape[0], tasks) if biases else None

    def __call__(
        self, rows: Rows, args: tuple[Any, ...], named: Mapping[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        """The layer's output with each row's change added, summed in float32 or wider."""
        inputs: torch.Tensor = (*args, *named.values())[0]
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        x = rows.chunks(inputs, self.name).reshape(len(rows), -1, inputs.shape[-1])
        y = wide.reshape(len(rows), -1, wide.shape[-1])
        if self._together is not None:
            self._together.add(rows, x, y)
        for task, members in rows.groups(self._products):
            _add_product(self._products[task], members, x, y)
        if self._bias is not None:
            self._bias.add(rows, y)
        return y.view_as(output).to(output.dtype)


class _Packed:
    """Entries of all tasks, for a kernel that takes them one after another."""

    def __init__(self, entries: Mapping[int, Entries], tasks: int) -> None:
        from deltakit.kernels.batched_rows import Packed

        self._packed = Packed.of(entries, tasks)

    def add(self, rows: Rows, x: torch.Tensor, y: torch.Tensor) -> None:
        """y [rows, n, out] += S x, for x [rows, n, in]."""
        self._packed.add(rows.numbers(x.device), x, y)


class _Gathered:
    """Entries of the light tasks, padded to the fullest with zeros: [tasks + 1, 1, entries]."""

    def __init__(self, entries: Mapping[int, Entries], tasks: int) -> None:
        values = next(iter(entries.values()))[2]
        self.counts = [len(entries[task][2]) if task in entries else 0 for task in range(tasks + 1)]
        shape = (tasks + 1, 1, max(self.counts))
        self.out = torch.zeros(shape, dtype=torch.int64, device=values.device)
        self.column = torch.zeros_like(self.out)
        self.values = torch.zeros(shape, dtype=values.dtype, device=values.device)
        for task, parts in entries.items():
            padded = (self.out, self.column, self.values)
            for whole, part in zip(padded, parts, strict=True):
                whole[task, 0, : len(part)] = part

    def add(self, rows: Rows, x: torch.Tensor, y: torch.Tensor) -> None:
        """y [rows, n, out] += S x, for x [rows, n, in]."""
        numbers = rows.numbers(x.device)
        tokens = max(1, min(x.shape[1], BUFFER // self.values.shape[2]))
        step = max(1, BUFFER // (tokens * self.values.shape[2]))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            widest = max(self.counts[task] for task in rows.tasks[part])
            if not widest:
                continue
            chosen = numbers[part]
            out, column = self.out[chosen, :, :widest], self.column[chosen, :, :widest]
            values = self.values[chosen, :, :widest]
            for first in range(0, x.shape[1], tokens):
                inputs = x[part, first : first + tokens]
                outputs = y[part, first : first + tokens]
                size = (len(chosen), inputs.shape[1], widest)
                terms = inputs.gather(2, column.expand(size)).to(y.dtype)
                _add_at(outputs, out.expand(size), terms.mul_(values))


def _add_at(outputs: torch.Tensor, at: torch.Tensor, terms: torch.Tensor) -> None:
    """outputs [rows, n, out] += terms [rows, n, k] at positions of the same shape."""
    if not runs_ahead(outputs):
        outputs.scatter_add_(2, at, terms)
        return
    # scatter_add_ adds in any order on a device, index_put_ sorts first.
    row, token = (torch.arange(size, device=at.device) for size in at.shape[:2])
    outputs.index_put_((row[:, None, None], token[:, None], at), terms, accumulate=True)


class _Bias:
    """Changes of a bias as rows [tasks + 1, columns] over the columns that any task changes."""

    def __init__(self, changes: Mapping[int, Change], features: int, tasks: int) -> None:
        union = torch.unique(torch.cat([change.indices for change in changes.values()]))
        self.columns = union if len(union) <= SCATTERED * features else None
        first = next(iter(changes.values())).difference
        self.values = first.new_zeros(tasks + 1, features)
        for task, change in changes.items():
            self.values[task, change.indices] = change.difference
        if self.columns is not None:
            self.values = self.values[:, union]

    def add(self, rows: Rows, y: torch.Tensor) -> None:
        """y [rows, n, out] += c."""
        each = self.values[rows.numbers(y.device), None].to(y.dtype)
        if self.columns is None:
            y += each
        else:
            y.index_add_(2, self.columns, each.expand(-1, y.shape[1], -1))


def _add_product(
    matrix: torch.Tensor, members: list[int], x: torch.Tensor, y: torch.Tensor
) -> None:
    """y[members] += matrix x[members], in blocks of tokens, for a sparse matrix [out, in]."""
    inputs = select(x, members).reshape(-1, x.shape[2])
    block = max(1, 4 * BUFFER // max(matrix.shape))
    parts = [
        torch.sparse.mm(matrix, part.t().to(matrix.dtype).contiguous()).t()
        for part in torch.split(inputs, block)
    ]
    product = torch.cat(parts).reshape(len(members), x.shape[1], -1).to(y.dtype)
    y.index_add_(0, torch.tensor(members, device=y.device), product)


def _coordinates(
    indices: torch.Tensor, shape: tuple[int, int], *, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and input features of flat indices, int64 [n] each, in row-major order of either."""
    out, inputs = shape
    if transposed:
        return indices % out, indices // out
    return indices // inputs, indices % inputs


def _compressed(
    out: torch.Tensor, column: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    order = out.argsort(stable=True)
    counts = torch.bincount(out, minlength=shape[0])
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    with warnings.catch_warnings():  # torch says once that sparse tensors are in beta
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(
            starts, column[order].int(), values[order], shape, check_invariants=False
        )
