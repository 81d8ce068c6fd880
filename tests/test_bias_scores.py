"""Which entries are biases, and the choices of bitfit, s-bitfit and u-bitfit."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from heuristic_lab import (
    Net,
    chosen_entries,
    highest,
    make_calibration,
    summed_gradients,
    vector_sums,
)
from torch import nn

import deltakit as dk
from deltakit.errors import BudgetError
from deltakit.selection import METHODS


def test_true_biases_leave_norms_and_weights_out() -> None:
    tuner = dk.SparseTuner(Net(), METHODS["bitfit"](budget=11))
    assert chosen_entries(tuner.delta()) == {
        "head.bias": {0, 1, 2},
        "twice.bias": set(range(6)),
        "unused.bias": {0, 1},
    }
    with pytest.raises(BudgetError, match="budget 12 is more than the 11 bias entries"):
        dk.SparseTuner(Net(), METHODS["bitfit"](budget=12))


def test_norms_and_biases_are_told_by_type_and_by_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)
            self.recurrent = nn.LSTM(4, 4)
            self.steps = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
            self.scale = nn.GroupNorm(2, 4)
            self.ln_1 = nn.Linear(4, 4)
            self.final_layer_norm = nn.Linear(4, 4)

    delta = dk.SparseTuner(Odd(), METHODS["bitfit"](budget=52)).delta()
    assert list(delta.tensors) == [
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "recurrent.bias_hh_l0",
        "recurrent.bias_ih_l0",
        "steps.1.bias",
    ]


def test_a_small_bitfit_budget_is_shared_by_size_and_nested() -> None:
    supports = []
    for budget in range(1, 12):
        delta = dk.SparseTuner(Net(), METHODS["bitfit"](budget=budget, seed=5)).delta()
        assert delta.nnz == budget
        for n, tensor in delta.tensors.items():
            share = budget * Net().get_parameter(n).numel() / 11
            assert abs(tensor.nnz - share) < 1
        supports.append({(n, i) for n, indices in chosen_entries(delta).items() for i in indices})
    assert all(a < b for a, b in pairwise(supports))


def test_s_bitfit_takes_whole_vectors_and_cuts_the_last() -> None:
    sums = {n: s.flatten()[0].item() for n, s in vector_sums(Net()).items()}
    biases = {n: Net().get_parameter(n).numel() for n, s in sums.items() if s > -torch.inf}
    ranked = sorted(biases, key=lambda n: -sums[n])
    for budget in range(1, 12):
        method = METHODS["s-bitfit"](budget=budget, num_batches=2)
        delta = dk.SparseTuner(Net(), method, calibration=make_calibration()).delta()
        left, expected = budget, {}
        for n in ranked:
            if taken := min(left, biases[n]):
                expected[n] = set(range(taken))
            left -= taken
        assert chosen_entries(delta) == expected
    with pytest.raises(BudgetError, match="12 is more than the 11 bias"):
        dk.SparseTuner(Net(), METHODS["s-bitfit"](budget=12), calibration=make_calibration())


def test_u_bitfit_takes_the_best_bias_entries() -> None:
    grads, net = summed_gradients(Net(), 2), Net()
    names = ["head.bias", "twice.bias", "unused.bias"]
    scores = {n: (-net.get_parameter(n).detach() * grads[n]).clamp(min=0) for n in names}
    method = METHODS["u-bitfit"](budget=3, num_batches=2)
    delta = dk.SparseTuner(Net(), method, calibration=make_calibration()).delta()
    assert chosen_entries(delta) == highest(scores, 3)
    full = METHODS["u-bitfit"](budget=11)
    assert dk.SparseTuner(Net(), full, calibration=make_calibration()).delta().nnz == 11
