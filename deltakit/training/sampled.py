"""Gradients of chosen entries of a weight matrix, without the gradients of the others.

All functions return one number per entry, in row-major order of the entries, float32
(float64 where the gradient is float64). An entry (r, c) of a layer's weight has the gradient
sum over tokens n of left[n, r] * right[n, c], where left and right are the layer's activations and
the gradient of its outputs, or the other way round: a sampled dense-dense product (SDDMM).

The first two work by Triton's kernels where `kernels.dispatch` says so, and by torch elsewhere; on
one machine equal inputs give equal bits either way. They are registered operators where a model
is compiled, opaque to `torch.compile`, so that models compile whole; elsewhere the functions behind
them are called, which is quicker.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch

from deltakit.kernels.dispatch import by_triton, runs_ahead
from deltakit.training.transposes import BUFFER, block_length, remembered, transposed


def sampled_product(
    activations: torch.Tensor,
    gradient: torch.Tensor,
    starts: torch.Tensor,
    columns: torch.Tensor,
    *,
    activations_left: bool,
) -> torch.Tensor:
    """Entries of the product left^T @ right, [nnz].

    activations, gradient: [..., features], of any floating dtype; the weight's rows belong to the
    activations if `activations_left`, else to the gradient. starts: int32 [rows + 1], columns:
    int32 [nnz], the entries in compressed sparse row form. Tokens are taken in blocks, so that
    buffers stay bounded; sums are in the dtype of the result.
    """
    if _is_traced(gradient):
        traced: torch.Tensor = _sampled_product(
            activations, gradient, starts, columns, activations_left=activations_left
        )
        return traced
    dtype = _sum_dtype(gradient)
    if by_triton(gradient):
        from deltakit.kernels.product import product

        both = [tokens.reshape(-1, tokens.shape[-1]) for tokens in (activations, gradient)]
        left, right = both if activations_left else both[::-1]
        return product(left, right, starts, columns, dtype)
    total = torch.zeros(len(columns), dtype=dtype, device=gradient.device)
    block = block_length(max(activations.shape[-1], gradient.shape[-1]))
    gradients = transposed(gradient, block, dtype)
    for pair in zip(remembered(activations, block, dtype), gradients, strict=True):
        left, right = pair if activations_left else pair[::-1]
        total += _sampled_block(left, right, starts, columns)
    return total


def _is_traced(gradient: torch.Tensor) -> bool:
    return torch.compiler.is_compiling() or type(gradient) is not torch.Tensor


_sampled_product = torch.library.custom_op("deltakit::sampled_product", mutates_args=())(
    sampled_product
)


@_sampled_product.register_fake
def _(
    activations: torch.Tensor,
    gradient: torch.Tensor,
    starts: torch.Tensor,
    columns: torch.Tensor,
    *,
    activations_left: bool,
) -> torch.Tensor:
    return gradient.new_empty(columns.shape, dtype=_sum_dtype(gradient))


def sampled_embedding(
    tokens: torch.Tensor,
    gradient: torch.Tensor,
    starts: torch.Tensor,
    columns: torch.Tensor,
    widest: int,
    padding: int,
) -> torch.Tensor:
    """Entries of an embedding's gradient, [nnz].

    tokens: int [...], the rows looked up. gradient: [..., features]. starts, columns: as above.
    widest: entries of the fullest row. padding: the row that learns nothing, or -1.
    """
    if _is_traced(gradient):
        traced: torch.Tensor = _sampled_embedding(
            tokens, gradient, starts, columns, widest, padding
        )
        return traced
    rows, wanted = tokens.reshape(-1).long(), gradient.reshape(-1, gradient.shape[-1])
    if by_triton(gradient):
        from deltakit.kernels.lookup import lookup

        return lookup(rows, wanted, starts, columns, padding, _sum_dtype(gradient))
    total = torch.zeros(len(columns), dtype=_sum_dtype(gradient), device=gradient.device)
    length = max(1, BUFFER // max(1, 4 * widest))
    if runs_ahead(gradient):
        for ids, part in zip(torch.split(rows, length), torch.split(wanted, length), strict=True):
            _add_padded(total, ids, part, starts, columns, widest, padding)
        return total
    for ids, part in zip(torch.split(rows, length), torch.split(wanted, length), strict=True):
        first = starts[ids].long()
        counts = (starts[ids + 1] - first).masked_fill_(ids == padding, 0)
        token = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), counts)
        before = counts.cumsum(0) - counts
        entry = torch.arange(len(token), device=ids.device) + (first - before)[token]
        total.index_add_(0, entry, part[token, columns[entry]].to(total.dtype))
    return total


def _add_padded(
    total: torch.Tensor,
    ids: torch.Tensor,
    part: torch.Tensor,
    starts: torch.Tensor,
    columns: torch.Tensor,
    widest: int,
    padding: int,
) -> None:
    """The same for some tokens, as many entries for each as the fullest row has, most of them void.

    So all shapes are known to the host, which need not wait for a device to count.
    """
    first = starts[ids].long()
    counts = (starts[ids + 1] - first).masked_fill_(ids == padding, 0)[:, None]
    place = torch.arange(widest, device=ids.device)
    entry = (first[:, None] + place).clamp_(max=len(columns) - 1)
    taken = part.gather(1, columns[entry].long()).to(total.dtype).masked_fill_(place >= counts, 0)
    # index_add_ adds in any order on a device, index_put_ sorts first.
    total.index_put_((entry.view(-1),), taken.view(-1), accumulate=True)


_sampled_embedding = torch.library.custom_op("deltakit::sampled_embedding", mutates_args=())(
    sampled_embedding
)


@_sampled_embedding.register_fake
def _(
    tokens: torch.Tensor,
    gradient: torch.Tensor,
    starts: torch.Tensor,
    columns: torch.Tensor,
    widest: int,
    padding: int,
) -> torch.Tensor:
    return gradient.new_empty(columns.shape, dtype=_sum_dtype(gradient))


def submatrix_product(
    activations: torch.Tensor,
    gradient: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    places: torch.Tensor,
    *,
    activations_left: bool,
) -> torch.Tensor:
    """Entries of the product left^T @ right of occupied rows and columns only, [nnz].

    rows, columns: int64, those with entries; places: int64 [nnz], flat positions in their product.
    It is taken in the gradient's dtype, as the whole product would be.
    """
    pair = activations, gradient
    left, right = pair if activations_left else pair[::-1]
    product = _chosen(left, rows).t() @ _chosen(right, columns)
    return product.reshape(-1).index_select(0, places).to(_sum_dtype(gradient))


def sampled_bias(gradient: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Entries of a bias's gradient, the sum over tokens, [n]. indices: int64 [n]."""
    flat = gradient.reshape(-1, gradient.shape[-1])
    return flat.index_select(1, indices).sum(0, dtype=_sum_dtype(gradient))


def _chosen(tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    flat = tokens.reshape(-1, tokens.shape[-1])
    return flat if len(features) == flat.shape[1] else flat.index_select(1, features)


def _sum_dtype(gradient: torch.Tensor) -> torch.dtype:
    return torch.float64 if gradient.dtype == torch.float64 else torch.float32


def _sampled_block(
    left: torch.Tensor, right: torch.Tensor, starts: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """left: [rows, n], right: [columns, n], both contiguous; returns [nnz]."""
    if _has_sampled_addmm(left.device, left.dtype):
        # The template must be finite: beta=0 multiplies it all the same.
        template = torch.zeros(len(columns), dtype=left.dtype, device=left.device)
        shape = (len(left), len(right))
        pattern = torch.sparse_csr_tensor(starts, columns, template, shape, check_invariants=False)
        product: torch.Tensor = torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0)
        return product.values()
    return _gathered_block(left, right, starts, columns)


def _gathered_block(
    left: torch.Tensor, right: torch.Tensor, starts: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """The same with index_select alone, in bounded chunks of entries."""
    numbers = torch.arange(len(left), device=left.device)
    rows = torch.repeat_interleave(numbers, starts.diff().long(), output_size=len(columns))
    length = max(1, BUFFER // max(1, left.shape[1]))
    parts = [
        (left.index_select(0, r) * right.index_select(0, c)).sum(1)
        for r, c in zip(torch.split(rows, length), torch.split(columns, length), strict=True)
    ]
    return torch.cat(parts)


@cache
def _has_sampled_addmm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch has the kernel for the device and dtype: tried once."""
    one = torch.ones(1, 1, dtype=dtype, device=device)
    try:
        with warnings.catch_warnings():  # torch says once that sparse tensors are in beta
            warnings.simplefilter("ignore")
            torch.sparse.sampled_addmm(one.to_sparse_csr(), one, one, beta=0.0)
    except (RuntimeError, NotImplementedError):
        return False
    return True
