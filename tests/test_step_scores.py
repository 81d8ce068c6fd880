"""Scores of a step's gradient against their formula, and the first step's choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from heuristic_lab import (
    Net,
    chosen_entries,
    gradients_of,
    highest,
    loss_of,
    token_batches,
    weights_of,
)

import deltakit as dk
from deltakit.selection import Static
from deltakit.selection.gradient import Gradient
from deltakit.selection.heuristics import StepScore
from deltakit.selection.sam import SAM
from deltakit.selection.snip import Snip
from deltakit.selection.u_bitfit import UBitFit

STEP_SCORES: list[tuple[StepScore, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = [
    (Gradient(), lambda g, w: g.abs()),
    (SAM(), lambda g, w: g.abs()),
    (Snip(), lambda g, w: (g * w).abs()),
    (UBitFit(), lambda g, w: (-w * g).clamp(min=0)),
]


@pytest.mark.parametrize(("heuristic", "reference"), STEP_SCORES)
def test_step_scores_equal_their_formula_and_their_bound_drops_no_winner(
    heuristic: StepScore, reference: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 1e-25, 1e-41):
        g = torch.randn(3000, generator=generator) * scale
        w = torch.randn(3000, generator=generator) * torch.rand(3000, generator=generator) ** 8
        scores = heuristic.score(g, w)
        assert scores.dtype == torch.float32 and bool((scores >= 0).all())
        assert torch.equal(scores, reference(g, w))
        bounds = w.abs().min().item(), w.abs().max().item()
        for score in scores[scores > 0].sort().values[::97].tolist():
            bound = heuristic.least_gradient(score, *bounds)
            assert bool((g.abs()[scores >= score].double() >= bound).all())
    assert float(heuristic.score(torch.zeros(1), torch.ones(1))) == 0


def test_sam_orders_squares_that_float32_cannot_hold() -> None:
    g = torch.tensor([1e-30, -3e-30, 2e-30, 1e25, -2e25])
    order = SAM().score(g, torch.ones(5)).argsort(descending=True)
    assert order.tolist() == (g.double() ** 2).argsort(descending=True).tolist()


@pytest.mark.parametrize(("heuristic", "reference"), STEP_SCORES)
def test_the_first_step_chooses_by_its_own_gradient(heuristic: StepScore, reference: Any) -> None:
    model = Net()
    batch = token_batches(1)[0]
    grads, weights = gradients_of(Net(), batch), weights_of(model)
    tuner = dk.SparseTuner(model.eval(), Static(budget=25, heuristic=heuristic))
    loss_of(model, batch).backward()
    tuner.step()
    expected = highest({n: reference(grads[n], weights[n]) for n in grads}, 25)
    assert chosen_entries(tuner.delta()) == expected
