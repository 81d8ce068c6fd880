"""Small trainings that a process does alone or as one of several, each with its share of a batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import deltakit as dk
from deltakit.dtypes import Array

STEPS, BATCH = 6, 16


class Branching(torch.nn.Module):
    """Two experts, of which each row reaches one; a norm with buffers; a head to be an extra."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = torch.nn.Embedding(12, 10)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(10, 10) for _ in range(2))
        self.norm = torch.nn.BatchNorm1d(10, momentum=0.0)  # its statistics stay at their start
        self.body = torch.nn.Linear(10, 24)
        self.unused = torch.nn.Linear(5, 5)
        self.head = torch.nn.Linear(24, 3)
        self.to(dtype).eval()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: int64 [B, 2]; logits [B, 3]. A row's first token decides its expert."""
        x = self.embed(tokens).sum(1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = tokens[:, 0] % 2 == number
            if mine.any():
                out = out.index_put((mine.nonzero()[:, 0],), expert(x[mine]))
        return self.head(torch.tanh(self.body(self.norm(out))))


def method(name: str) -> Any:
    budget = {"budget": 60}
    made: dict[str, Callable[[], Any]] = {
        "random": lambda: dk.RandomMask(**budget, seed=3),
        "id3": lambda: dk.ID3(**budget, steps=4),
        "id3 factored": lambda: dk.ID3(
            **budget, steps=4, precondition="factored", allocation="proportional"
        ),
        "repeat": lambda: dk.Repeat(**budget, every=2),
        "drop-and-grow": lambda: dk.DropAndGrow(**budget, every=2),
    }
    return made[name]()


METHODS = ("random", "id3", "id3 factored", "repeat", "drop-and-grow")


class Trained(NamedTuple):
    """What came of a run: the file's bytes, and per tensor its indices and values."""

    file: bytes
    indices: dict[str, Array]
    values: dict[str, Array]
    extras: dict[str, Array]


def train(
    name: str,
    *,
    dtype: str = "float64",
    passes: int = 1,
    exchange: Any = "exact",
    sorted_rows: bool = False,
) -> Trained:
    """A run of STEPS steps; this rank sees every n-th row of each batch.

    passes: backward passes per step. sorted_rows: each rank gets rows of one expert only.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = Branching(getattr(torch, dtype))
    tuner = dk.SparseTuner(
        model,
        method(name),
        lr=1e-2,
        extras="head.*",
        accumulation_steps=passes,
        total_steps=STEPS,
        max_grad_norm=0.5,
        exchange=exchange,
    )
    generator = torch.Generator().manual_seed(11)
    for _ in range(STEPS):
        for _ in range(passes):
            tokens = torch.randint(0, 12, (BATCH, 2), generator=generator)
            if sorted_rows:  # half the rows even, half odd, by rank
                tokens[:, 0] = tokens[:, 0] // 2 * 2 + torch.arange(BATCH) % 2
            labels = tokens.sum(1) % 3
            part = slice(rank, None, size)
            loss = torch.nn.functional.cross_entropy(model(tokens[part]), labels[part])
            (loss / passes).backward()
        tuner.step()
    delta = tuner.delta()
    tuner.close()
    with tempfile.TemporaryDirectory() as folder:
        dk.save(delta, path := Path(folder) / "delta.sdelta")
        file = path.read_bytes()
    return Trained(
        file,
        {n: t.indices for n, t in delta.tensors.items()},
        {n: np.asarray(t.values) for n, t in delta.tensors.items()},
        {n: np.asarray(v, np.float64) for n, v in delta.extras.items()},
    )


def train_all(cases: list[tuple[str, dict[str, Any]]]) -> list[Trained]:
    """Several runs in one process, so that starting it pays."""
    return [train(name, **options) for name, options in cases]
