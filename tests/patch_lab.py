"""Models in training, their states and patches, for the tests of weight patches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import deltakit as dk
from deltakit.dtypes import DType

State = dict[str, torch.Tensor]


def random_words(kind: DType, count: int, seed: int) -> np.ndarray[Any, Any]:
    """Raw bits of any payload, NaNs and both zeros among them; 0 and 1 for bool."""
    high = 2 if kind.name == "bool" else 2 ** (8 * kind.itemsize)
    return np.random.default_rng(seed).integers(0, high, count, kind.words)


def as_torch(words: np.ndarray[Any, Any], kind: DType) -> torch.Tensor:
    signed = words.view(np.uint8 if kind.itemsize == 1 else f"<i{kind.itemsize}")
    return torch.from_numpy(signed.copy()).view(getattr(torch, kind.name))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(bits(t) == bits(other[n]) for n, t in one.items())


class Model(torch.nn.Module):
    """A matrix, a vector and a saved buffer of three dtypes."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.w = torch.nn.Parameter(torch.randn(40, 30, generator=random).bfloat16())
        self.b = torch.nn.Parameter(torch.randn(30, generator=random))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


def train(model: Model, step: int) -> None:
    """Change some bits of everything; every second step changes a weight and back."""
    random = np.random.default_rng(step)
    with torch.no_grad():
        at = torch.from_numpy(random.choice(1200, 50, replace=False))
        model.w.view(-1).view(torch.int16)[at] ^= 3
        model.w.view(-1)[7] = float("nan") if step % 2 else -0.0
        model.b[step] = torch.tensor(-0.0 if step % 2 else 1.5)
        model.get_buffer("seen").add_(1)


def chain(steps: int, **options: Any) -> tuple[list[dk.SparseDelta], list[State], dk.PatchStream]:
    """Patches of a run, the states from the first to the last, and the stream that made them."""
    model = Model()
    stream = dk.PatchStream(model, **options)
    patches, states = [], [snapshot(model)]
    for step in range(steps):
        train(model, step)
        patches.append(stream.step(model))
        states.append(snapshot(model))
    return patches, states, stream


def snapshot(model: torch.nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
