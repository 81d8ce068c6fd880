"""Quantised models whose full-precision bases are on disk, and the dense models that they equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from deltakit.quantized.layers import dequantised, quantised_layers
from deltakit.quantized.replacing import quantize_model
from deltakit.quantized.scheme import Quantization

HOWS = {
    "nf4": Quantization(kind="nf4"),
    "nf4-double": Quantization(kind="nf4", double=True),
    "fp4": Quantization(kind="fp4"),
    "int8": Quantization(kind="int8"),
}


class Net(torch.nn.Module):
    """Tokens to classes: an embedding, linear layers (one used twice), a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(20, 32)
        self.up = torch.nn.Linear(32, 96)
        self.down = torch.nn.Linear(96, 32)
        self.twice = torch.nn.Linear(32, 32, bias=False)
        self.norm = torch.nn.LayerNorm(32)
        self.head = torch.nn.Linear(32, 5)

    def body(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.down(torch.nn.functional.gelu(self.up(self.norm(hidden))))
        return torch.tanh(self.twice(torch.tanh(self.twice(hidden))))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(self.embed(tokens)).mean(1))
        return out


LAYERS = ("up.weight", "down.weight", "twice.weight")


def write_net(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The checkpoint of a `Net`, one file."""
    save_file(plain(dtype).state_dict(), path)
    return path


def plain(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def quantized(how: str = "nf4", dtype: torch.dtype = torch.float32) -> Net:
    net = plain(dtype)
    quantize_model(net, HOWS[how])
    return net


def dense(model: torch.nn.Module, original: torch.nn.Module) -> Any:
    """`original` with the weights that the codes of its quantised copy stand for."""
    same = copy.deepcopy(original)
    with torch.no_grad():
        for name, layer in quantised_layers(model).items():
            same.get_parameter(name).copy_(dequantised(layer))
    return same


def batch(number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, 20, (6, 7), generator=generator)
    return tokens, torch.randint(0, 5, (6,), generator=generator)


def loss(model: Any, given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(given[0]).float(), given[1])


def train(
    tuner: Any, steps: int, after: Callable[[], object] = lambda: None, *, start: int = 0
) -> None:
    tuner.model.train()
    for step in range(start, start + steps):
        torch.autograd.backward(loss(tuner.model, batch(step)))
        tuner.step()
        after()


def codes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a model would save, as bits."""
    return {
        name: tensor.clone().contiguous().view(torch.uint8)
        for name, tensor in model.state_dict().items()
        if tensor.ndim
    }
