"""y + S x behind a layer, for a sparse matrix S: the product, and its gradient to the inputs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

BUFFER = 2**20  # elements of a gathered block of activations: 4 MiB


@dataclass(frozen=True, eq=False)
class Pattern:
    """Where the entries of a matrix [out, in] lie, by its occupied rows and columns.

    rows, columns: int64 [r], [c], sorted. starts, inner: int32 [r + 1], [nnz], compressed sparse
    rows of the occupied part [r, c]; turned_starts, turned_inner: of its transpose. order: int64
    [nnz], the transpose's entries among those in row-major order.
    """

    shape: tuple[int, int]
    rows: torch.Tensor
    columns: torch.Tensor
    starts: torch.Tensor
    inner: torch.Tensor
    turned_starts: torch.Tensor
    turned_inner: torch.Tensor
    order: torch.Tensor

    @classmethod
    def of(cls, indices: torch.Tensor, shape: tuple[int, int]) -> Pattern:
        """indices: flat, int64 [nnz], sorted, at least one."""
        rows, row = torch.unique(indices // shape[1], return_inverse=True)
        columns, column = torch.unique(indices % shape[1], return_inverse=True)
        order = torch.argsort(column, stable=True)
        return cls(
            shape=shape,
            rows=rows,
            columns=columns,
            starts=_starts(row, len(rows)),
            inner=column.int(),
            turned_starts=_starts(column, len(columns)),
            turned_inner=row[order].int(),
            order=order,
        )


def add_product(
    output: torch.Tensor, inputs: torch.Tensor, values: torch.Tensor, pattern: Pattern
) -> torch.Tensor:
    """output [..., out] + S inputs [..., in], summed in float32 and rounded once.

    values: float32 [nnz], S's entries in row-major order; no gradient reaches them.
    """
    p = pattern
    forward = (values, p.starts, p.inner, p.rows, p.columns)
    backward = (p.order, p.turned_starts, p.turned_inner)
    apply: Any = _AddProduct.apply
    total: torch.Tensor = apply(output, inputs, *forward, *backward)
    return total


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, inputs: torch.Tensor, *pattern: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*pattern)
        ctx.inputs = inputs.shape[-1], inputs.dtype
        values, starts, inner, rows, columns, *_ = pattern
        with torch.autocast(inputs.device.type, enabled=False):  # it would narrow the product
            total: torch.Tensor = _product(
                inputs, values, starts, inner, columns, rows, output.shape[-1]
            )
        return total.add_(output).to(output.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, _, _, rows, columns, order, starts, inner = ctx.saved_tensors
        features, dtype = ctx.inputs
        back = None
        if ctx.needs_input_grad[1]:
            turned = values.index_select(0, order)
            with torch.autocast(gradient.device.type, enabled=False):
                made = _product(gradient, turned, starts, inner, rows, columns, features)
            back = made.to(dtype)
        return gradient, back, *[None] * 8


@torch.library.custom_op("deltakit::sparse_product", mutates_args=())
def _product(
    tokens: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    inner: torch.Tensor,
    taken: torch.Tensor,
    given: torch.Tensor,
    features: int,
) -> torch.Tensor:
    """Product of a sparse matrix with every token: [..., in] -> [..., features], float32.

    starts, inner, values: compressed sparse rows of its part with entries, whose columns are the
    features `taken` of a token and whose rows are the features `given`; all others are zero.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    total = flat.new_zeros(len(flat), features, dtype=values.dtype)
    shape = (len(given), len(taken))
    with warnings.catch_warnings():  # torch says once that sparse tensors are in beta
        warnings.simplefilter("ignore")
        matrix = torch.sparse_csr_tensor(starts, inner, values, shape, check_invariants=False)
    length = max(1, BUFFER // max(shape))
    for start in range(0, len(flat), length):
        part = flat[start : start + length].index_select(1, taken).to(values.dtype)
        made = torch.sparse.mm(matrix, part.t().contiguous())
        total[start : start + length].index_copy_(1, given, made.t())
    return total.view(*tokens.shape[:-1], features)


@_product.register_fake
def _(
    tokens: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    inner: torch.Tensor,
    taken: torch.Tensor,
    given: torch.Tensor,
    features: int,
) -> torch.Tensor:
    return tokens.new_empty(*tokens.shape[:-1], features, dtype=values.dtype)


def _starts(rows: torch.Tensor, height: int) -> torch.Tensor:
    counts = torch.bincount(rows, minlength=height)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
