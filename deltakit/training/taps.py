"""Identities behind a layer that turn its output's gradient into its entries' gradient.

Each takes the layer's output and input and a carrier, a leaf [nnz] whose gradient backward
accumulates. The output's own gradient passes through to the layer unchanged.
"""

from __future__ import annotations

from typing import Any

import torch

from deltakit.training.sampled import sampled_embedding, sampled_product, submatrix_product


class Tap(torch.autograd.Function):
    """What all taps share: `forward(ctx, output, inputs, carrier, *pattern)`."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, inputs: torch.Tensor, carrier: torch.Tensor, *pattern: Any
    ) -> torch.Tensor:
        """Keep the layer's input and the pattern (tensors first, then numbers)."""
        tensors = [part for part in pattern if isinstance(part, torch.Tensor)]
        ctx.save_for_backward(inputs, *tensors)
        ctx.numbers = pattern[len(tensors) :]
        # No view in the eyes of autograd, so that an activation behind it may work in place.
        return torch.ops.aten._unsafe_view(output, output.shape)  # type: ignore[no-any-return]


class SampledTap(Tap):
    """Pattern: starts, columns, activations_left; see `sampled_product`."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The output's gradient, and the carrier's."""
        inputs, starts, columns = ctx.saved_tensors
        (left,) = ctx.numbers
        entries = sampled_product(inputs, gradient, starts, columns, activations_left=left)
        return gradient, None, entries, None, None, None


class SubmatrixTap(Tap):
    """Pattern: rows, columns, places, activations_left; see `submatrix_product`."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The output's gradient, and the carrier's."""
        inputs, *pattern = ctx.saved_tensors
        (left,) = ctx.numbers
        entries = submatrix_product(inputs, gradient, *pattern, activations_left=left)
        return gradient, None, entries, None, None, None, None


class EmbeddingTap(Tap):
    """Pattern: starts, columns, widest, padding; see `sampled_embedding`."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """No gradient for what was looked up, and the carrier's."""
        tokens, starts, columns = ctx.saved_tensors
        entries = sampled_embedding(tokens, gradient, starts, columns, *ctx.numbers)
        return None, None, entries, None, None, None, None
