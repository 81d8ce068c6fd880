"""Layers whose forward stays torch's own, followed by a tap that learns their entries' gradient.

The weight is detached, so backward computes nothing for it; `untap` gives the layer its class's
forward back. Only exact `nn.Linear`, transformers' `Conv1D` and plain `nn.Embedding` are tapped:
what a subclass does with its weight is not known here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch.nn import functional

from deltakit.training.gradient_path import GradientPath
from deltakit.training.taps import EmbeddingTap, SampledTap, SubmatrixTap, Tap


def can_tap(module: torch.nn.Module) -> bool:
    """Whether the module is of a known kind, and nobody has changed how it works."""
    kind = type(module)
    if "forward" in vars(module) or module._parameters.get("weight") is None:
        return False
    if kind is torch.nn.Embedding:
        return not (module.max_norm or module.scale_grad_by_freq or module.sparse)
    return kind is torch.nn.Linear or _is_conv1d(module)


Carried = tuple[torch.Tensor, torch.nn.Parameter]


def tap(
    layer: torch.nn.Module, path: GradientPath, entries: Carried, bias: Carried | None = None
) -> None:
    """Let backward give carriers, leaves [nnz], the gradients of the layer's entries.

    entries: the weight's, flat indices int64 [nnz], sorted, and their carrier. path: "sampled" or
    "submatrix"; embeddings, which are looked up and not multiplied, know only the first. bias: the
    bias's entries, likewise; None leaves the bias to autograd.
    """
    weight = layer._parameters["weight"]
    assert weight is not None
    indices, carrier = entries
    at, bias_carrier = bias or (indices.new_empty(0), None)  # a view would keep all indices
    chosen: dict[str, Any] = {"native": _linear, "tap": SampledTap}
    chosen |= {"carrier": carrier, "bias_carrier": bias_carrier}
    if type(layer) is torch.nn.Embedding:
        padding = -1 if layer.padding_idx is None else layer.padding_idx
        starts, columns = compressed(indices, weight)
        widest = int(starts.diff().max())
        chosen |= {"native": _embedding, "tap": EmbeddingTap}
        pattern: tuple[Any, ...] = (starts, columns, widest, padding)
    else:
        transposed = _is_conv1d(layer)
        if transposed:
            chosen["native"] = _conv1d
        if path == "submatrix":
            chosen["tap"] = SubmatrixTap
            pattern = (at, *occupied(indices, weight), transposed)
        else:
            pattern = (at, *compressed(indices, weight), transposed)
    layer._tap = _LayerTap(pattern=pattern, **chosen)  # type: ignore[assignment]
    layer.forward = MethodType(forward, layer)


def untap(layer: torch.nn.Module) -> None:
    """Take the tap away again."""
    del layer.forward, layer._tap


@dataclass(frozen=True, eq=False)
class _LayerTap:
    """What the forward of one layer needs: torch's own function, and the tap behind it."""

    native: Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    tap: type[Tap]
    carrier: torch.nn.Parameter
    bias_carrier: torch.nn.Parameter | None
    pattern: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies of a layer, pickled ones too, are not in training: their tap is None."""
        return type(None), ()


def forward(self: Any, *args: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
    """The forward of a tapped layer. Its name lets a pickled layer find its class's forward."""
    if self._tap is None:
        untapped: torch.Tensor = type(self).forward(self, *args, **named)
        return untapped
    (inputs,) = (*args, *named.values())
    if inputs.is_floating_point():
        inputs = _as_autocast(inputs)
    bias = self._parameters.get("bias")
    if bias is not None and self._tap.bias_carrier is not None:
        bias = bias.detach()
    output = self._tap.native(self, inputs, self.weight.detach(), bias)
    carriers = self._tap.carrier, self._tap.bias_carrier
    tapped: torch.Tensor = self._tap.tap.apply(output, inputs, *carriers, *self._tap.pattern)
    return tapped


def _as_autocast(inputs: torch.Tensor) -> torch.Tensor:
    """Cast as autocast would do inside the layer, so that the tap keeps no second copy."""
    device = inputs.device.type
    if inputs.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return inputs
    return inputs.to(torch.get_autocast_dtype(device))


def _linear(
    layer: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return functional.linear(inputs, weight, bias)


def _conv1d(
    layer: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    assert bias is not None
    flat = torch.addmm(bias, inputs.view(-1, inputs.size(-1)), weight)
    return flat.view(*inputs.shape[:-1], layer.nf)


def _embedding(
    layer: Any, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return functional.embedding(tokens, weight, layer.padding_idx)


def _is_conv1d(module: torch.nn.Module) -> bool:
    # Where nothing has imported transformers, no layer is of its kind.
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and type(module) is transformers.Conv1D


def compressed(indices: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts [rows + 1] and columns [nnz] of the compressed sparse row form, int32."""
    height, width = weight.shape
    counts = torch.bincount(indices // width, minlength=height)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return starts.int(), (indices % width).int()


def occupied(indices: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows and columns with entries, and the entries' flat places in their submatrix, int64."""
    width = weight.shape[1]
    rows, row = torch.unique(indices // width, return_inverse=True)
    columns, column = torch.unique(indices % width, return_inverse=True)
    return rows, columns, row * len(columns) + column
