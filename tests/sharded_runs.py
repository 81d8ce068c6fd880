"""Small trainings of a model that FSDP2 has split, and of the same model in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from parallel_runs import STEPS, Trained, trained
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import deltakit as dk
from deltakit.parallel.global_best import Candidates, winners
from deltakit.parallel.ranks import Ranks
from deltakit.parallel.shards import held_here, is_split, whole
from deltakit.selection import METHODS as REGISTERED
from deltakit.training import fixed_support
from deltakit.training.sharded_model import load_sharded

BATCH = 12  # which two and three processes can share equally


class Stacked(torch.nn.Module):
    """Two blocks whose tensors have numbers of rows that few numbers of processes divide."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = torch.nn.Embedding(13, 10)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(10, 2), torch.nn.Tanh(), torch.nn.Linear(2, 10))
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


def train(name: str, *, paths: str | None = None, **options: Any) -> Trained:
    """A run of STEPS steps; this rank sees every n-th row of each batch.

    paths: how gradients of a fixed support are computed, where the cheapest is not wanted.
    """
    with paths_of(paths):
        return trained(run(name, **options).delta())


@contextmanager
def paths_of(name: str | None) -> Iterator[None]:
    """Within it fixed supports take this path wherever a layer can be tapped."""
    chosen = {"product_path": name, "embedding_path": "sampled", "bias_is_sparse": True}
    before = {function: getattr(fixed_support, function) for function in chosen}
    for function, answer in chosen.items() if name else ():
        setattr(fixed_support, function, _answering(answer))
    try:
        yield
    finally:
        for function, original in before.items():
            setattr(fixed_support, function, original)


def _answering(answer: Any) -> Callable[..., Any]:
    return lambda *args, **named: answer and (answer is not True or args[0].parameter.ndim == 1)


def run(
    name: str, *, dtype: str = "float64", passes: int = 1, steps: int = STEPS, **options: Any
) -> dk.SparseTuner:
    """The tuner of such a run after `steps` steps."""
    model = Stacked(getattr(torch, dtype))
    tuner = dk.SparseTuner(
        sharded(model) if dist.is_initialized() else model,
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
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for _ in range(passes):
            tokens = torch.randint(0, 13, (BATCH, 2), generator=generator)
            labels, part = tokens.sum(1) % 3, slice(rank, None, size)
            loss = torch.nn.functional.cross_entropy(tuner.model(tokens[part]), labels[part])
            (loss / passes).backward()
        tuner.step()


METHODS: dict[str, Any] = {
    "random": lambda: dk.RandomMask(budget=60, seed=3),
    "id3": lambda: dk.ID3(budget=60, steps=4),
    "id3 factored": lambda: dk.ID3(
        budget=60, steps=4, precondition="factored", allocation="proportional"
    ),
    "once": lambda: dk.Static(budget=60, heuristic="d3"),
    "magnitude": lambda: dk.Increment(budget=60, heuristic="magnitude-largest", steps=4),
}


def begin(
    cases: list[tuple[str, dict[str, Any]]], some: list[tuple[str, str]]
) -> tuple[list[Trained], list[dict[str, Any]]]:
    """Several runs and halves of others in one process, so that starting it pays."""
    return [train(name, **options) for name, options in cases], halves(some)


def laws(folder: Path) -> dict[str, Any]:
    """What this rank finds out about sharded runs, in one process, so that starting it pays."""
    return {
        "held": what_is_held(folder),
        "exchanged": [exchanged(name) for name in ("random", "id3")],
        "refused": refusals(folder),
        "best": best_of_all(),
        "zeros": run_without_gradients(),
        "pretrained": {name: pretrained(folder / name) for name in ("llama", "gpt2")},
        "continued": trained(run("random", steps=2, init_delta=dk.load(folder / "first")).delta()),
    }


def what_is_held(folder: Path) -> dict[str, Any]:
    """Of a run: entries here and in all, the delta that `save` wrote, and the weights that moved."""
    before = {name: p.detach() for name, p in Stacked(torch.float64).named_parameters()}
    tuner = run("id3")
    tuner.save(folder / "saved")
    delta = tuner.delta()
    dk.save(delta, folder / f"delta-{dist.get_rank()}")
    moved = {}
    for name, parameter in tuner.model.named_parameters():
        changed = whole(parameter).ne(before[name]).reshape(-1).nonzero()[:, 0]
        moved[name] = set(changed.tolist())
    chosen = {name: set(t.indices.tolist()) for name, t in delta.tensors.items()}
    values = tuner.engine.entries.values
    return {
        "count": tuner.engine.entries.count,
        "places": len(values),
        "state": [t.shape for t in tuner.optimizer.state[values].values()],
        "unmasked": tuner.unmasked,
        "stray": {n: at - chosen.get(n, set()) for n, at in moved.items() if "head" not in n},
        "rows": [held_here(p).shape[0] for p in tuner.model.parameters()],
    }


def exchanged(name: str) -> list[list[int]]:
    """The sizes of what each step adds up over processes, beside what FSDP does itself."""
    sent: list[int] = []
    reduce = dist.all_reduce

    def counted(tensor: torch.Tensor) -> None:
        sent.append(tensor.numel())
        reduce(tensor)

    steps = []
    with paths_of("sampled"):
        tuner = run(name, steps=0)
        with patch.object(dist, "all_reduce", counted):
            for step in range(STEPS):
                advance(tuner, range(step, step + 1))
                steps.append(list(sent))
                sent.clear()
    return steps


def refusals(folder: Path) -> dict[str, str]:
    """The errors of what cannot be: other methods, other ways to split a model, other supports."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns = sharded(Stacked(torch.float32))
    tensor = distribute_tensor(torch.ones(10, 4), mesh, [Shard(1)])
    columns.norm.weight = torch.nn.Parameter(tensor)
    part = Stacked(torch.float32)
    fully_shard(part.blocks[0], mesh=mesh)
    calibration = dk.Batches([torch.arange(4).view(2, 2)], lambda m, b: m(b).sum())
    found = {
        "columns": (columns, dk.ID3(budget=5, steps=2), {}),
        "part": (part, dk.ID3(budget=5, steps=2), {}),
        "repeat": (None, dk.Repeat(budget=5), {}),
        "drop-and-grow": (None, dk.DropAndGrow(budget=5), {"total_steps": 9}),
        "fish": (None, REGISTERED["fish"](budget=5), {"calibration": calibration}),
        "apart": (None, dk.RandomMask(budget=5, seed=dist.get_rank()), {}),
    }
    told = {}
    for name, (model, method, options) in found.items():
        try:
            dk.SparseTuner(model or sharded(Stacked(torch.float32)), method, **options)
        except dk.DeltakitError as error:
            told[name] = str(error)
    try:
        dk.apply(sharded(Stacked(torch.float64)), dk.load(folder / "first"))
    except dk.DeltakitError as error:
        told["apply"] = str(error)
    return told


def best_of_all() -> list[tuple[list[int], int]]:
    """Of candidates that all ranks draw alike: the numbers of this rank's winners, and what lacks.

    Few different scores, so that ties at the threshold cross tensors and processes.
    """
    ranks, found = Ranks(dist.get_rank(), dist.get_world_size()), []
    for mine, wanted in drawn(ranks.size, ranks.rank):
        keep, lacking = winners(ranks, [Candidates(mine[0], mine[1])], [wanted], [0] * 3)
        found.append((mine[2][keep[0]].tolist(), lacking[0]))
    return found


def drawn(size: int, rank: int | None = None) -> Iterator[tuple[Any, int]]:
    """Rounds of (scores, tensors, numbers) in tie order, of one rank or all, and how many win.

    Numbers are in the order of tensors, and within a tensor in that of ranks.
    """
    generator = torch.Generator().manual_seed(5)
    for wanted in (0, 1, 7, 20, 60, 100):
        scores = torch.rand(60, generator=generator)
        scores = torch.where(scores < 0.8, (scores * 4).ceil(), scores * 1e-30)
        owners = torch.randint(0, 3, (60,), generator=generator).sort().values
        holders = torch.empty(60, dtype=torch.int64)
        for tensor in range(3):
            inside = owners == tensor
            some = torch.randint(0, size, (int(inside.sum()),), generator=generator)
            holders[inside] = some.sort().values
        mine = torch.ones(60, dtype=torch.bool) if rank is None else holders == rank
        numbers = torch.arange(60)[mine]
        order = torch.argsort(-scores[mine], stable=True)
        kept = order[:wanted] if rank is not None else order  # a pool holds no more
        yield (scores[mine][kept], owners[mine][kept], numbers[kept]), wanted


def pretrained(folder: Path) -> dict[str, Any]:
    """A transformers model that the first rank loads for all: its logits, and a delta of it."""
    from transformers import AutoConfig, AutoModelForCausalLM  # takes seconds; others need none

    load = partial(AutoModelForCausalLM.from_pretrained, folder)
    config = AutoConfig.from_pretrained(folder)
    model = load_sharded(
        load, lambda dtype: AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    )
    split = all(is_split(parameter) for parameter in model.parameters())
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        same = torch.equal(model(tokens).logits, load()(tokens).logits)
    tuner = dk.SparseTuner(
        model, dk.ID3(budget=90, steps=2, allocation="proportional"), lr=1e-2, base=folder
    )
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        tuner.step()
    tuner.save(folder / "delta.sdelta")
    weights = {name: whole(parameter) for name, parameter in model.named_parameters()}
    return {"same": same, "split": split, "weights": weights}


def run_without_gradients() -> Trained:
    """A selection in which too few entries have a gradient: the rest comes in tie order."""
    model = Stacked(torch.float64)
    tuner = dk.SparseTuner(
        sharded(model) if dist.is_initialized() else model, dk.ID3(budget=200, steps=1), lr=1e-2
    )
    tuner.model(torch.zeros(2, 2, dtype=torch.int64)).square().mean().backward()
    tuner.step()
    return trained(tuner.delta())


def half(name: str, optimizer: str) -> dict[str, Any]:
    """The state of a run after the first half."""
    return run(name, steps=STEPS // 2, optimizer=optimizer).state_dict()


def second_half(name: str, optimizer: str, states: list[dict[str, Any]]) -> Trained:
    """What becomes of a run that goes on from the states of all that took part in its first half."""
    tuner = run(name, steps=0, optimizer=optimizer)
    tuner.load_state_dict(deepcopy(states))  # as in torch, training goes on in these very tensors
    advance(tuner, range(STEPS // 2, STEPS))
    return trained(tuner.delta())


def halves(cases: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """The first halves of several runs."""
    return [half(*case) for case in cases]


def second_halves(
    cases: list[tuple[str, str]], states: list[list[list[dict[str, Any]]]]
) -> list[list[Trained]]:
    """Their second halves, from the states that several numbers of processes have left."""
    return [
        [second_half(*case, each) for case, each in zip(cases, left, strict=True)]
        for left in states
    ]
