"""The module of a bottleneck adapter, and the hooks by which it stands at a layer of a model.

The adapter is a child of the layer that it stands at, so all names of the base stay, and a forward
hook of that layer calls it. The hook holds no adapter but looks its layer's up, so a copy of the
model, pickled or by `deepcopy`, calls its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from deltakit.adapters.bottleneck_config import bottleneck_width

CHILD = "adapter"  # name of the child

_FUNCTIONS: dict[str, Any] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
}


class BottleneckAdapter(torch.nn.Module):
    """y + scaling * up(activation(down(x))) of a layer's output y.

    x is y itself (Houlsby et al. 2019, section 2.1) or, with a `source`, what that layer was called
    with (He et al. 2022, table 1, "Parallel Adapter"). All [..., width]. The parameters are zero
    until values are loaded: the adapter changes nothing then. The sum is made in the wider of the
    two dtypes and rounded to that of y.
    """

    def __init__(
        self,
        width: int,
        config: Mapping[str, Any],
        source: Source | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        size = bottleneck_width(config, width)
        self.down = _zeros(width, size, device, dtype)
        self.up = _zeros(size, width, device, dtype)
        self.activation = str(config["activation"])
        self.scaling = float(config["scaling"])
        self.residual = bool(config["residual"])
        self.source = source

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        x = y if self.source is None else self.source.take()
        hidden = self.down(x.to(self.down.weight.dtype))
        change = self.up(activate(self.activation, hidden)) * self.scaling
        result: torch.Tensor = y + change if self.residual else change
        return result.to(y.dtype)


class Source:
    """Forward pre-hook that carries what a layer reads to the adapter; copies carry nothing."""

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None

    def __call__(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.value = inputs[0]

    def __getstate__(self) -> dict[str, None]:
        return {"value": None}

    def take(self) -> torch.Tensor:
        """What the layer read, which is let go of."""
        value, self.value = self.value, None
        assert value is not None, "the layer that the adapter reads was not called"
        return value


def adapted(
    layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor:
    """Forward hook: what the layer's adapter makes of its output."""
    result: torch.Tensor = layer.get_submodule(CHILD)(output)
    return result


def activate(activation: str, hidden: torch.Tensor) -> torch.Tensor:
    """An activation, by its name among `bottleneck_config.ACTIVATIONS`."""
    if activation == "identity":
        return hidden
    if activation == "gelu_tanh":
        return functional.gelu(hidden, approximate="tanh")
    result: torch.Tensor = _FUNCTIONS[activation](hidden)
    return result


def _zeros(inputs: int, outputs: int, device: torch.device, dtype: torch.dtype) -> torch.nn.Linear:
    """A linear layer of zeros that draws nothing from torch's global generator."""
    layer: torch.nn.Linear = torch.nn.utils.skip_init(  # type: ignore[no-untyped-call]
        torch.nn.Linear, inputs, outputs, device=device, dtype=dtype
    )
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    return layer
