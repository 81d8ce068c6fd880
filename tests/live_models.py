"""A small live model without a checkpoint, and random deltas for it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

import deltakit as dk
from deltakit.identity import fingerprint, sample_positions
from deltakit.live.arrays import dtype_name, to_numpy

SHAPES = {"0.weight": (40, 30), "1.weight": (20, 40), "1.bias": (20,)}


def make_model(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.nn.Sequential:
    """Two linear layers of random weights."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Linear(40, 20)).to(dtype)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_equal(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    """Whether all weights of a model have these bits."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return all(
        torch.equal(t.view(words[t.itemsize]), weights[n].view(words[t.itemsize]))
        for n, t in model.state_dict().items()
    )


def random_delta(
    model: torch.nn.Module, seed: int, mode: Literal["add", "set"] = "add"
) -> dk.SparseDelta:
    """Entries in about a third of each tensor, so that several overlap; knows its base."""
    rng = np.random.default_rng(seed)
    live = dict(model.named_parameters())
    tensors, prints = {}, {}
    for name, shape in SHAPES.items():
        parameter = live[name].detach()
        numel = parameter.numel()
        indices = np.sort(rng.choice(numel, numel // 3, replace=False))
        values = torch.from_numpy(rng.standard_normal(len(indices)))
        base = to_numpy(parameter.reshape(-1))
        tensors[name] = dk.TensorDelta(
            name=name,
            shape=shape,
            dtype=dtype_name(parameter),
            mode=mode,
            indices=indices,
            values=values.numpy() if mode == "add" else to_numpy(values.to(parameter.dtype)),
            base_values=None if mode == "add" else base[indices],
        )
        prints[name] = fingerprint(base[sample_positions(name, shape)], base[indices])
    return dk.SparseDelta(tensors=tensors, base=dk.BaseIdentity(tensors=prints))
