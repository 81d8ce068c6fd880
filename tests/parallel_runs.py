"""Small trainings that a process does alone or as one of several, each with its share of a batch."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import deltakit as dk
from deltakit.dtypes import Array
from deltakit.parallel import averaging
from deltakit.parallel.in_order import InOrder
from deltakit.parallel.ranks import Ranks

STEPS, BATCH = 6, 16


class Branching(torch.nn.Module):
    """Two experts, of which each row reaches one; a norm with buffers; a head to be an extra."""

    def __init__(self, dtype: torch.dtype, momentum: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = torch.nn.Embedding(12, 10)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(10, 10) for _ in range(2))
        self.norm = torch.nn.BatchNorm1d(10, momentum=momentum)
        self.body = torch.nn.Linear(10, 24)
        self.unused = torch.nn.Linear(5, 5)
        self.head = torch.nn.Linear(24, 3)
        self.to(dtype).train(momentum > 0)

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
    momentum: float = 0.0,
) -> Trained:
    """A run of STEPS steps; this rank sees every n-th row of each batch.

    passes: backward passes per step. sorted_rows: each rank gets rows of one expert only. momentum:
    of the norm's statistics, which stay as they are at 0.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = Branching(getattr(torch, dtype), momentum)
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
    return trained(delta)


def trained(delta: dk.SparseDelta) -> Trained:
    """The delta of a run, told in plain arrays."""
    with tempfile.TemporaryDirectory() as folder:
        dk.save(delta, path := Path(folder) / "delta.sdelta")
        file = path.read_bytes()
    return Trained(
        file,
        {n: t.indices for n, t in delta.tensors.items()},
        {n: np.asarray(t.values) for n, t in delta.tensors.items()},
        {n: np.asarray(v, np.float64) for n, v in delta.extras.items()},
    )


class Exchanged(NamedTuple):
    """What a step sent: the sizes of its collectives, by their kind."""

    averaged: list[int]
    gathered: list[int]


def exchanged(name: str, exchange: Any = "exact") -> list[Exchanged]:
    """The collectives of every step of a run on a model without buffers."""
    sent = Exchanged([], [])
    reduce, gather = dist.all_reduce, dist.all_gather

    def counted_reduce(tensor: torch.Tensor) -> None:
        sent.averaged.append(tensor.numel())
        reduce(tensor)

    def counted_gather(found: list[torch.Tensor], tensor: torch.Tensor) -> None:
        sent.gathered.append(tensor.numel())
        gather(found, tensor)

    model = Branching(torch.float32)
    model.norm = torch.nn.Identity()  # type: ignore[assignment]
    tuner = dk.SparseTuner(
        model, method(name), lr=1e-2, extras="head.*", total_steps=STEPS, exchange=exchange
    )
    steps = []
    dist.all_reduce, dist.all_gather = counted_reduce, counted_gather  # type: ignore[assignment]
    try:
        for _ in range(STEPS):
            model(torch.randint(0, 12, (8, 2))).square().sum().backward()
            tuner.step()
            steps.append(Exchanged(list(sent.averaged), list(sent.gathered)))
            sent.averaged.clear()
            sent.gathered.clear()
    finally:
        dist.all_reduce, dist.all_gather = reduce, gather
    return steps


def taken_in_order(numbers: int, rounds: int) -> tuple[list[list[int]], list[int]]:
    """The order in which gradients are let go, where each rank's come shuffled and some not at all.

    Also the order in which this rank's came in the first round.
    """
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    shuffled = random.Random(ranks.rank)
    taken: list[int] = []
    turns = InOrder(
        ranks,
        range(numbers),
        lambda number, gradient: taken.append(number),
        lambda number: torch.zeros(1),
        torch.device("cpu"),
    )
    found, first = [], []
    for _ in range(rounds):
        came = shuffled.sample(range(numbers), numbers - 3)
        first = first or came
        for number in came:
            turns.ready(number, torch.ones(1))
        turns.finish()
        found.append(list(taken))
        taken.clear()
    return found, first


def trained_with_buffers() -> Trained:
    """A run in which every rank's batches move the norm's statistics their own way."""
    return train("random", momentum=0.5)


def trained_on_all_candidates() -> list[Trained]:
    """The same run by either exchange, where every entry is a candidate."""
    averaging.SHARE = 1.0
    return [train("id3 factored", exchange=exchange) for exchange in ("exact", "candidates")]


def start_apart() -> list[str]:
    """The errors of runs that start from other weights, another support and another head."""
    told = []
    for part, options in (("body", {}), ("head", {}), (None, {"seed": dist.get_rank()})):
        model = Branching(torch.float32)
        if part and dist.get_rank():
            torch.nn.init.ones_(getattr(model, part).weight)
        try:
            chosen = dk.RandomMask(budget=20, **options)
            dk.SparseTuner(model, chosen, lr=1e-2, extras="head.*")
        except dk.DeltakitError as error:
            told.append(str(error))
    return told


def laws() -> dict[str, Any]:
    """All of the above, in one process per rank, so that starting them pays."""
    return {
        "order": taken_in_order(20, 3),
        "fixed": exchanged("random"),
        "exact": exchanged("id3"),
        "candidates": exchanged("id3", "candidates"),
        "buffers": trained_with_buffers(),
        "apart": start_apart(),
        "all candidates": trained_on_all_candidates(),
    }


def train_all(cases: list[tuple[str, dict[str, Any]]]) -> list[Trained]:
    """Several runs in one process, so that starting it pays."""
    return [train(name, **options) for name, options in cases]
