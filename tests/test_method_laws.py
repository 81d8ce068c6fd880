"""The laws that every registered heuristic and method keeps."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from heuristic_lab import (
    MEASURES,
    PHASE,
    RATE,
    STEPS,
    Net,
    chosen_entries,
    loss_of,
    make_calibration,
    scene_of,
    scores_of,
    token_batches,
    weights_of,
)
from torch import nn

import deltakit as dk
from deltakit.selection import HEURISTICS, METHODS
from deltakit.selection.grasp import Grasp
from deltakit.selection.heuristics import Measure
from deltakit.selection.lt_sft import LotteryTicket


def _registered() -> list[tuple[str, Any]]:
    made = []
    for record in HEURISTICS:
        phased = hasattr(record.target, "dense_lr")
        made.append((record.name, record.target(**PHASE) if phased else record.target()))
    made += [(name, heuristic) for name, (heuristic, _) in MEASURES.items()]
    made.append(("lt-sft in turns", LotteryTicket(**PHASE, iterations=3)))
    made.append(("grasp by differences", Grasp(difference=1e-3)))
    return [(name, h) for name, h in made if isinstance(h, Measure)]


def _state(model: nn.Module) -> list[Any]:
    bits = {n: t.detach().clone() for n, t in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    return [bits, flags, [m.training for m in model.modules()], torch.get_rng_state()]


@pytest.mark.parametrize(("name", "heuristic"), _registered(), ids=[n for n, _ in _registered()])
def test_measuring_leaves_no_trace_and_repeats_itself(name: str, heuristic: Measure) -> None:
    """Weights, buffers, gradients, modes and random numbers, with dropout and a frozen layer."""
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and name == "grasp by differences":
            continue
        model = Net(dtype, dropout=0.3)
        model.embed.requires_grad_(False)  # noqa: FBT003
        model.ln_f.eval()
        model.head.weight.grad = torch.ones_like(model.head.weight)
        scene = scene_of(model, ("twice.weight",))
        before = deepcopy(_state(model))
        budgets = 9 if name == "s-bitfit" else 30
        first = scores_of(heuristic.measure(scene, budgets), scene)
        first = {n: s.clone() for n, s in first.items()}
        after = _state(model)
        assert all(torch.equal(before[0][n], t) for n, t in after[0].items())
        for (needed, grad), (needs, now) in zip(before[1], after[1], strict=True):
            assert needed == needs and (grad is None) == (now is None)
            assert grad is None or torch.equal(grad, now)
        assert before[2] == after[2] and torch.equal(before[3], after[3])
        torch.rand(3)
        again = scores_of(heuristic.measure(scene, budgets), scene)
        assert all(torch.equal(first[n], s) for n, s in again.items())
        assert all(not s.isnan().any() and s.numel() for s in first.values())


NOT_THESE = {"static", "increment", "repeat", "drop-and-grow", "random", "id3"}
NOT_THESE |= {"bernoulli", "heads", "n:m", "mask"}  # of a budget, model or mask of their own


@pytest.mark.parametrize("name", [r.name for r in METHODS if r.name not in NOT_THESE])
def test_every_method_meets_its_budget_and_moves_only_chosen_entries(name: str) -> None:
    options = {"dense_lr": RATE} if name in HEURISTICS.names() else {}
    phased = name in ("lt-sft", "child-tuning-f", "diff-pruning", "threshold-mask")
    extras = ["head.weight"] if name == "threshold-mask" else []  # something to train
    for budget in (1, 10) if "bitfit" in name else (1, 10, 150):
        model = Net(torch.float32)
        before = weights_of(model)
        tuner = dk.SparseTuner(
            model,
            METHODS[name](budget=budget, **(options if phased else {})),
            calibration=make_calibration(),
            total_steps=STEPS,
            lr=RATE,
            extras=extras,
        )
        for batch in token_batches(STEPS):
            loss_of(model, batch).backward()
            tuner.step()
        delta = tuner.delta()
        assert delta.nnz == budget
        chosen = chosen_entries(delta)
        for n, weight in weights_of(model).items():
            if n in extras:
                continue
            moved = set((weight != before[n]).flatten().nonzero().flatten().tolist())
            assert moved <= chosen.get(n, set()), n
