"""Small trainings of a model that FSDP2 has split, and of the same model in one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from parallel_runs import BATCH, STEPS, Trained, trained
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import deltakit as dk


class Stacked(torch.nn.Module):
    """Two blocks whose tensors have numbers of rows that few numbers of processes divide."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = torch.nn.Embedding(13, 10)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(10, 3), torch.nn.Tanh(), torch.nn.Linear(3, 10))
            for _ in range(2)
        )
        self.norm = torch.nn.LayerNorm(10)
        self.head = torch.nn.Linear(10, 3)
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: int64 [B, 2]; logits [B, 3]."""
        x = self.embed(tokens).sum(1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def sharded(model: Stacked) -> Stacked:
    """The model, split among all processes, block by block."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(name: str, *, whole: bool = False, **options: Any) -> Trained:
    """A run of STEPS steps; this rank sees every n-th row of each batch.

    whole: leave the model unsplit, in data-parallel training or alone.
    """
    return trained(run(name, whole=whole, **options).delta())


def run(
    name: str,
    *,
    whole: bool = False,
    dtype: str = "float64",
    passes: int = 1,
    steps: int = STEPS,
    **options: Any,
) -> dk.SparseTuner:
    """The tuner of such a run after `steps` steps."""
    alone = not dist.is_initialized()
    model = Stacked(getattr(torch, dtype))
    tuner = dk.SparseTuner(
        model if whole or alone else sharded(model),
        METHODS[name](),
        lr=1e-2,
        extras="head.*",
        accumulation_steps=passes,
        total_steps=STEPS,
        max_grad_norm=0.5,
        **options,
    )
    advance(tuner, range(steps), passes)
    return tuner


def advance(tuner: dk.SparseTuner, steps: range, passes: int = 1) -> None:
    """Train on with the batches of these steps."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for step in range(steps.stop):
        generator = torch.Generator().manual_seed(step)
        for _ in range(passes):
            tokens = torch.randint(0, 13, (BATCH, 2), generator=generator)
            if step not in steps:
                continue
            part = slice(rank, None, size)
            labels = tokens.sum(1) % 3
            loss = torch.nn.functional.cross_entropy(tuner.model(tokens[part]), labels[part])
            (loss / passes).backward()
        if step in steps:
            tuner.step()


METHODS: dict[str, Any] = {
    "random": lambda: dk.RandomMask(budget=60, seed=3),
    "id3": lambda: dk.ID3(budget=60, steps=4),
    "id3 factored": lambda: dk.ID3(
        budget=60, steps=4, precondition="factored", allocation="proportional"
    ),
}


def train_all(cases: list[tuple[str, dict[str, Any]]]) -> list[Trained]:
    """Several runs in one process, so that starting it pays."""
    return [train(name, **options) for name, options in cases]
