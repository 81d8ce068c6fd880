"""Heuristics with a dense phase against naive loops of the same training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heuristic_lab import (
    PHASE,
    RATE,
    STEPS,
    Net,
    chosen_entries,
    highest,
    loss_of,
    make_calibration,
    scene_of,
    token_batches,
    train_dense,
    weights_of,
)
from torch import nn

import deltakit as dk
from deltakit.errors import ConfigError, TrainingError
from deltakit.selection import METHODS, Static
from deltakit.selection.diff_pruning import DiffPruning
from deltakit.selection.lt_sft import LotteryTicket
from deltakit.selection.scene import Scene
from deltakit.training.calibration import Batches


def test_lottery_tickets_of_several_iterations_follow_the_dense_loop() -> None:
    """Dense, pick a third, rewind, tune what is chosen; what was tuned keeps its values."""
    budget = 20
    reference = Net()
    base = start = weights_of(reference)
    mask = {n: torch.zeros_like(w, dtype=torch.bool) for n, w in base.items()}
    for turn in (1, 2, 3):
        after = train_dense(reference, STEPS, start=start)
        change = {n: (after[n] - base[n]).abs().masked_fill(mask[n], -1) for n in base}
        share = budget * turn // 3 - sum(int(m.sum()) for m in mask.values())
        for n, indices in highest(change, share).items():
            mask[n].view(-1)[list(indices)] = True
        if turn < 3:
            start = train_dense(reference, STEPS, lambda n, g: g * mask[n], start=start)
    model = Net()
    method = Static(budget=budget, heuristic=LotteryTicket(**PHASE, iterations=3))
    tuner = dk.SparseTuner(model, method, calibration=make_calibration(), total_steps=STEPS)
    delta = tuner.delta()
    assert chosen_entries(delta) == {
        n: set(m.flatten().nonzero().flatten().tolist()) for n, m in mask.items() if m.any()
    }
    moved = 0
    for n, tensor in delta.tensors.items():
        expected = (start[n] - base[n]).flatten()[tensor.indices]
        torch.testing.assert_close(torch.from_numpy(tensor.values), expected, rtol=1e-6, atol=1e-12)
        moved += int((expected != 0).sum())
    assert moved == budget * 2 // 3


def test_projected_entries_keep_the_values_of_random_children() -> None:
    reference, model = Net(), Net()
    base = weights_of(reference)
    after = train_dense(reference, STEPS, lambda n, g: g * (torch.rand_like(g) < 0.3) / 0.3)
    method = METHODS["child-tuning-f"](budget=40, dense_steps=STEPS, dense_lr=RATE)
    delta = dk.SparseTuner(model, method, calibration=make_calibration()).delta()
    assert delta.nnz == 40
    for n, tensor in delta.tensors.items():
        expected = (after[n] - base[n]).flatten()[tensor.indices]
        torch.testing.assert_close(torch.from_numpy(tensor.values), expected, rtol=1e-6, atol=1e-12)


def test_diff_pruning_equals_gates_differentiated_by_hand() -> None:
    """The gate's derivative written out, its penalty large enough to be seen."""
    penalty, gate_lr = 3e-2, 2.0
    reference = Net()
    base = weights_of(reference)
    live = dict(reference.train().named_parameters())
    names = sorted(live)
    values = {n: nn.Parameter(torch.zeros_like(base[n])) for n in names}
    logits = {n: nn.Parameter(torch.full_like(base[n], 5.0)) for n in names}
    groups: list[Any] = [
        {"params": list(values.values()), "lr": RATE},
        {"params": list(logits.values()), "lr": gate_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    batches = make_calibration().batches(0)
    torch.manual_seed(0)
    for step in range(12):
        for group, rate in zip(optimizer.param_groups, (RATE, gate_lr), strict=True):
            group["lr"] = rate * (1 - step / 12)
        gates, slopes = {}, {}
        for n in names:
            u = torch.rand(base[n].numel(), dtype=base[n].dtype).view_as(base[n])
            s = torch.sigmoid(torch.log(u) - torch.log(1 - u) + logits[n].detach())
            stretched = 3 * s - 1.5
            gates[n] = stretched.clamp(0, 1)
            slopes[n] = 3 * s * (1 - s) * ((stretched > 0) & (stretched < 1))
            live[n].data.copy_(base[n] + gates[n] * values[n].detach())
        reference.zero_grad()
        loss_of(reference, next(batches)).backward()
        optimizer.zero_grad()
        for n in names:
            if live[n].grad is not None:
                p = torch.sigmoid(logits[n].detach())
                values[n].grad = live[n].grad * gates[n]
                logits[n].grad = live[n].grad * values[n].detach() * slopes[n]
                logits[n].grad += penalty * p * (1 - p)
        optimizer.step()
    final = {n: (3 * torch.sigmoid(logits[n]) - 1.5).clamp(0, 1).detach() for n in names}
    assert any(bool((gate < 0.9).any()) for gate in final.values())
    model = Net()
    scene = scene_of(model)
    heuristic = DiffPruning(dense_steps=12, dense_lr=RATE, gate_lr=gate_lr, penalty=penalty)
    measured = heuristic.measure(scene, 10)
    assert measured.values is not None
    for target in scene.targets:
        expected = (final[target.name] * values[target.name].detach()).flatten()
        at = torch.arange(target.numel)
        found = measured.values(target.number, at)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
        assert torch.equal(measured.scores(target.number), found.abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threshold_masks_zero_exactly_the_lowest_scores(dtype: torch.dtype) -> None:
    """Scores follow a naive straight-through loop; chosen weights become +0.0, others stay."""
    reference = Net(dtype)
    base = {n: w.float() for n, w in weights_of(reference).items()}
    live = dict(reference.train().named_parameters())
    scores = {n: nn.Parameter(torch.full_like(base[n], 1e-2)) for n in sorted(live)}
    optimizer = torch.optim.AdamW(scores.values(), lr=3e-3, weight_decay=0.0)
    batches = make_calibration().batches(0)
    masked = 0
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 8)
        for n, score in scores.items():
            live[n].data.copy_(base[n] * (score.detach() >= 5e-3))
            masked += int((score.detach() < 5e-3).sum())
        reference.zero_grad()
        loss_of(reference, next(batches)).backward()
        for n, score in scores.items():
            grad = live[n].grad
            score.grad = None if grad is None else grad.float() * base[n]
        optimizer.step()
    assert masked > 50
    model = Net(dtype)
    before = weights_of(model)
    method = METHODS["threshold-mask"](budget=30, dense_steps=8, dense_lr=3e-3)
    measured = method.heuristic.measure(scene := scene_of(model), 30)
    for target in scene.targets:
        torch.testing.assert_close(
            measured.scores(target.number), -scores[target.name].detach().flatten()
        )
    tuner = dk.SparseTuner(model, method, calibration=make_calibration())
    chosen = chosen_entries(tuner.delta())
    assert sum(map(len, chosen.values())) == 30
    for n, weight in weights_of(model).items():
        zeroed = torch.zeros(weight.numel(), dtype=torch.bool)
        zeroed[list(chosen.get(n, set()))] = True
        bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        assert bool((weight.flatten()[zeroed].view(bits) == 0).all())
        assert torch.equal(weight.flatten()[~zeroed], before[n].flatten()[~zeroed])


def test_extras_learn_in_a_dense_phase_and_change_its_outcome() -> None:
    """A head trained along, in float32 beside bfloat16 weights, and put back."""
    for dtype in (torch.float32, torch.bfloat16):
        model = Net(dtype)
        head = model.head.weight.detach().clone()
        seen = []

        def spy(net: nn.Module, batch: Any, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(net.get_parameter("head.weight").detach().clone())
            return loss_of(net, batch)

        scene = scene_of(model, ("head.weight",))
        scene = Scene(
            targets=scene.targets,
            extras=scene.extras,
            model=model,
            calibration=Batches(token_batches(), spy),
        )
        LotteryTicket(**PHASE).measure(scene, 5)
        assert torch.equal(seen[0], head) and not torch.equal(seen[-1], head)
        assert torch.equal(model.head.weight, head)


def test_a_dense_phase_needs_a_length_and_tells_its_progress() -> None:
    scene = scene_of(Net(), total_steps=10)
    told: list[str] = []
    LotteryTicket(dense_fraction=0.5, say=told.append).measure(scene, 5)
    assert len(told) == 5 and told[-1].startswith("dense phase: step 5 of 5, loss ")
    open_ended = Scene(targets=scene.targets, model=scene.model, calibration=scene.calibration)
    with pytest.raises(ConfigError, match="dense_steps"):
        LotteryTicket().measure(open_ended, 5)
    diverging = Scene(
        targets=scene.targets,
        model=scene.model,
        calibration=Batches(token_batches(), lambda m, b: loss_of(m, b) * torch.inf),
    )
    with pytest.raises(TrainingError, match="step 0: the loss is inf; lower dense_lr"):
        LotteryTicket(**PHASE).measure(diverging, 5)
