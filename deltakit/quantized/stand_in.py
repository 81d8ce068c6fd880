"""What stands for a quantised weight wherever a parameter is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from deltakit.quantized.layers import quantised_layers, weight_dtype

if TYPE_CHECKING:
    from typing_extensions import Self


class StandIn(torch.nn.Parameter):
    """A parameter of the full weight's shape [out, in], dtype and device, one element in memory.

    It is all zeros, as the base of what is added beside the codes. Autograd accumulates a dense
    gradient into it like into any leaf.
    """

    layer: Any

    def __new__(cls, layer: Any, dtype: torch.dtype = torch.float32) -> Self:
        """Of a quantised layer."""
        none = torch.zeros((), dtype=dtype, device=layer.weight.device)
        whole = none.expand(layer.out_features, layer.in_features)
        self = torch.Tensor._make_subclass(cls, whole, require_grad=False)
        self.layer = layer
        return self


def whole_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The model's parameters by live name, quantised weights replaced by stand-ins of their own dtype."""
    layers = quantised_layers(model).items()
    whole = {name: StandIn(layer, weight_dtype(layer)) for name, layer in layers}
    return {**dict(model.named_parameters()), **whole}


def stand_ins(model: torch.nn.Module) -> dict[str, StandIn]:
    """Live name -> stand-in, float32 as S is, of the weight of every quantised layer."""
    return {name: StandIn(layer) for name, layer in quantised_layers(model).items()}
