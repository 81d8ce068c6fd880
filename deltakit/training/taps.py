"""Identities behind a layer that turn its output's gradient into its entries' gradient.

Each takes the layer's output and input and two carriers, leaves whose gradients backward
accumulates: of the weight's entries [nnz], and of the bias's [n], None where it has none. The
output's own gradient passes through to the layer unchanged.
"""

from __future__ import annotations

from typing import Any

import torch

from deltakit.training.sampled import (
    sampled_bias,
    sampled_embedding,
    sampled_product,
    submatrix_product,
)


class Tap(torch.autograd.Function):
    """What all taps share: `forward(ctx, output, inputs, carrier, bias_carrier, *pattern)`."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        inputs: torch.Tensor,
        carrier: torch.Tensor,
        bias_carrier: torch.Tensor | None,
        *pattern: Any,
    ) -> torch.Tensor:
        """Keep the layer's input and the pattern (tensors first, then numbers)."""
        tensors = [part for part in pattern if isinstance(part, torch.Tensor)]
        ctx.save_for_backward(inputs, *tensors)
        ctx.numbers = pattern[len(tensors) :]
        # No view in the eyes of autograd, so that an activation behind it may work in place.
        return torch.ops.aten._unsafe_view(output, output.shape)  # type: ignore[no-any-return]


class SampledTap(Tap):
    """Pattern: bias indices, starts, columns, activations_left; see `sampled_product`."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The output's gradient, and the carriers'."""
        inputs, bias, starts, columns = ctx.saved_tensors
        (left,) = ctx.numbers
        entries = sampled_product(inputs, gradient, starts, columns, activations_left=left)
        return gradient, None, entries, _bias(ctx, gradient, bias), None, None, None, None


class SubmatrixTap(Tap):
    """Pattern: bias indices, rows, columns, places, activations_left; see `submatrix_product`."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The output's gradient, and the carriers'."""
        inputs, bias, *pattern = ctx.saved_tensors
        (left,) = ctx.numbers
        entries = submatrix_product(inputs, gradient, *pattern, activations_left=left)
        return gradient, None, entries, _bias(ctx, gradient, bias), None, None, None, None, None


class DenseTap(Tap):
    """No pattern: the carrier stands for the whole weight, [out, in]."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The output's gradient, and the weight's."""
        (inputs,) = ctx.saved_tensors
        if not ctx.needs_input_grad[2]:
            return gradient, None, None, None
        left, right = (t.reshape(-1, t.shape[-1]) for t in (gradient, inputs))
        return gradient, None, left.t() @ right, None


class EmbeddingTap(Tap):
    """Pattern: starts, columns, widest, padding; see `sampled_embedding`."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """No gradient for what was looked up, and the carrier's."""
        tokens, starts, columns = ctx.saved_tensors
        entries = sampled_embedding(tokens, gradient, starts, columns, *ctx.numbers)
        return None, None, entries, None, None, None, None, None


def _bias(ctx: Any, gradient: torch.Tensor, indices: torch.Tensor) -> torch.Tensor | None:
    return sampled_bias(gradient, indices) if ctx.needs_input_grad[3] else None
