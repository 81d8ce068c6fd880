"""Checkpoints that several processes save together, for `parallel_lab.together`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

SHAPES = {"even": (4, 6), "uneven": (5, 3), "one row": (1, 7), "vector": (9,), "deep": (3, 4, 5)}


def tensors() -> dict[str, torch.Tensor]:
    """Tensors whose first and second dimensions split evenly, unevenly and not at all."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class Model(nn.Module):
    """Layers that two ranks split evenly and unevenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: int64 [B]; logits [B, 3]."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def save_placed(folder: str) -> None:
    """Save `tensors` split by rows, split by columns, and whole on every rank, and a scalar."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, Any] = {"scalar": torch.tensor(2.5)}
    for name, tensor in tensors().items():
        state[f"{name} by rows"] = distribute_tensor(tensor, mesh, [Shard(0)])
        state[f"{name} on all"] = distribute_tensor(tensor, mesh, [Replicate()])
        if tensor.dim() > 1:
            state[f"{name} by columns"] = distribute_tensor(tensor, mesh, [Shard(1)])
    dcp.save(state, checkpoint_id=folder)


def save_all(folder: str, steps: int) -> dict[str, torch.Tensor]:
    """Save `tensors` in the folder `placed`; train `Model` under FSDP2 in bfloat16 and save {"model",
    "optimizer", "step"} before and after, in step-0 and step-N. Returns its whole weights after."""
    save_placed(str(Path(folder) / "placed"))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Model().bfloat16()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.arange(4) + dist.get_rank()

    def write(step: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations within torch
            weights, states = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": states, "step": step}
            dcp.save(state, checkpoint_id=str(Path(folder) / f"step-{step}"))

    write(0)
    for _ in range(steps):
        model(tokens).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    write(steps)
    whole = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    return {name: tensor.clone() for name, tensor in whole.items()}
