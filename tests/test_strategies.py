"""Strategies: static, increment, repeat, drop and grow, against naive dense loops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.errors import BudgetError, ConfigError
from deltakit.selection.heuristics import Measurement
from deltakit.selection.scene import Scene

Masks = dict[str, torch.Tensor]
RATE = 1e-2


class Net(nn.Module):
    """Three tensors of different size, in tensor order a, b, c."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Linear(12, 10, bias=False)
        self.b = nn.Linear(10, 8, bias=False)
        self.c = nn.Linear(8, 3, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return logits


def _batches(count: int, dtype: torch.dtype = torch.float32) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(6, 12, generator=generator).to(dtype)
        yield x, torch.randint(0, 3, (6,), generator=generator)


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]).double(), batch[1])


def _train(model: nn.Module, method: Any, steps: int, **options: Any) -> dk.SparseTuner:
    tuner = dk.SparseTuner(model, method, lr=RATE, total_steps=steps, **options)
    dtype = next(model.parameters()).dtype
    for batch in _batches(steps, dtype):
        _loss(model, batch).backward()
        tuner.step()
    return tuner


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def _top(scores: dict[str, torch.Tensor], k: int) -> Masks:
    names = sorted(scores)
    flat = torch.cat([scores[n].flatten() for n in names])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    parts = mask.split([scores[n].numel() for n in names])
    return {n: m.view(scores[n].shape) for n, m in zip(names, parts, strict=True)}


class _DenseAdam:
    """Adam with a dense age per weight; an entry that joins starts with empty moments."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        zeros = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        self.mean = {n: z.clone() for n, z in zeros.items()}
        self.square = {n: z.clone() for n, z in zeros.items()}
        self.age = {n: z.clone() for n, z in zeros.items()}

    def forget(self, name: str, where: torch.Tensor) -> None:
        for state in (self.mean, self.square, self.age):
            state[name][where] = 0

    @torch.no_grad()
    def step(self, masks: Masks) -> None:
        for name, p in self.parameters.items():
            mask = masks[name]
            grad = p.grad[mask]  # type: ignore[index]
            self.age[name][mask] += 1
            self.mean[name][mask] = 0.9 * self.mean[name][mask] + 0.1 * grad
            self.square[name][mask] = 0.999 * self.square[name][mask] + 0.001 * grad * grad
            mean = self.mean[name][mask] / (1 - 0.9 ** self.age[name][mask])
            square = self.square[name][mask] / (1 - 0.999 ** self.age[name][mask])
            p[mask] -= RATE * mean / (square.sqrt() + 1e-8)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("restore", [True, False])
def test_repeat_equals_a_dense_loop(every: int, restore: bool) -> None:
    """Dropped entries return to the base bits, or stay; chosen again, they start anew."""
    budget, steps = 20, 10
    sparse = Net(torch.float64)
    method = dk.Repeat(budget=budget, heuristic="d3", every=every, restore=restore)
    tuner = _train(sparse, method, steps)
    dense = Net(torch.float64)
    before = _weights(dense)
    adam = _DenseAdam(dense)
    masks: Masks = {n: torch.zeros_like(w, dtype=torch.bool) for n, w in before.items()}
    ever = {n: m.clone() for n, m in masks.items()}
    for step, batch in enumerate(_batches(steps, torch.float64)):
        dense.zero_grad()
        _loss(dense, batch).backward()
        if step % every == 0:
            chosen = _top({n: p.grad.abs() for n, p in dense.named_parameters()}, budget)
            for name, p in dense.named_parameters():
                left = masks[name] & ~chosen[name]
                if restore:
                    p.data[left] = before[name][left]
                adam.forget(name, left)
            masks = chosen
            ever = {n: ever[n] | chosen[n] for n in ever}
        adam.step(masks)
    for name, p in dense.named_parameters():
        torch.testing.assert_close(sparse.get_parameter(name), p, rtol=1e-6, atol=1e-9)
    delta = tuner.delta()
    changed = masks if restore else ever
    for name, mask in changed.items():
        expected = mask.flatten().nonzero().flatten().numpy()
        found = delta.tensors[name].indices if name in delta.tensors else []
        np.testing.assert_array_equal(found, expected)
    assert (delta.nnz == budget) is restore
    assert delta.provenance["reached"] == delta.nnz == sum(int(m.sum()) for m in changed.values())


@pytest.mark.parametrize("restore", [True, False])
def test_a_resumed_repeat_has_the_same_bits(restore: bool) -> None:
    method = dk.Repeat(budget=20, every=2, restore=restore, heuristic="gradient")
    whole = Net()
    expected = _train(whole, method, 9)
    first = Net()
    half = dk.SparseTuner(first, method, lr=RATE, total_steps=9)
    batches = list(_batches(9))
    for batch in batches[:5]:
        _loss(first, batch).backward()
        half.step()
    second = Net()
    rest = dk.SparseTuner(second, method, lr=RATE, total_steps=9)
    rest.load_state_dict(half.state_dict())
    for batch in batches[5:]:
        _loss(second, batch).backward()
        rest.step()
    for name, weight in whole.named_parameters():
        assert torch.equal(second.get_parameter(name), weight), name
    assert rest.delta().nnz == expected.delta().nnz


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_drop_and_grow_keeps_budgets_and_exchanges_the_smallest(decay: str) -> None:
    """Each exchange against its definition, from the state before it."""
    model = Net()
    before = _weights(model)
    method = dk.DropAndGrow(budget=30, every=3, decay=decay, first_rate=0.5, seed=1)
    tuner = dk.SparseTuner(model, method, lr=RATE, total_steps=10)
    per_tensor = [len(t.indices) for t in tuner.engine.entries.targets]
    assert sum(per_tensor) == 30
    for step, batch in enumerate(_batches(10)):
        targets = tuner.engine.entries.targets
        held = [set(t.indices.tolist()) for t in targets]
        values = [tuner.engine.scoring.values(t.number).abs() for t in targets]
        sizes = [
            dict(zip(t.indices.tolist(), v.tolist(), strict=True))
            for t, v in zip(targets, values, strict=True)
        ]
        _loss(model, batch).backward()
        if step in (3, 6, 9):
            grads = {
                n: g.abs().flatten()
                for n, g in zip(
                    "abc",
                    torch.autograd.grad(_loss(model, batch), [*model.parameters()]),
                    strict=True,
                )
            }
        tuner.step()
        assert [len(t.indices) for t in targets] == per_tensor and tuner.unmasked == 30
        for target, old, size in zip(targets, held, sizes, strict=True):
            now = set(target.indices.tolist())
            if step not in (3, 6, 9):
                assert now == old
                continue
            left, joined = old - now, now - old
            assert len(left) == len(joined)
            if left:
                assert max(size[i] for i in left) <= min([size[i] for i in old & now] or [np.inf])
                score = grads[target.name[0]]
                others = [i for i in range(target.numel) if i not in old | now]
                assert score[list(joined)].min() >= score[others].max()
            moved = model.get_parameter(target.name).flatten() != before[target.name].flatten()
            assert set(moved.nonzero().flatten().tolist()) <= now


def test_increment_selects_every_n_steps_and_measured_rankings_are_followed() -> None:
    """floor(B (s + 1) / S) entries after selection s, whichever kind of heuristic is asked."""
    for heuristic in ("gradient", _Smallest()):
        model = Net()
        method = dk.Increment(budget=25, heuristic=heuristic, every=3, steps=9)
        tuner = dk.SparseTuner(model, method, lr=RATE)
        reached = []
        for batch in _batches(12):
            _loss(model, batch).backward()
            reached.append(tuner.unmasked)
            tuner.step()
        joined = [8] * 3 + [16] * 3 + [25] * 6
        ahead = joined if isinstance(heuristic, _Smallest) else [0, *joined[:-1]]
        assert reached == ahead
        order = np.concatenate([t.order for t in tuner.delta().tensors.values()])
        assert sorted(set(order)) == [0, 3, 6]


class _Smallest:
    """A measured heuristic: small weights first."""

    def measure(self, scene: Scene, budget: int) -> Measurement:
        return Measurement(lambda number: -scene.targets[number].parameter.abs())


class _Zeroing(_Smallest):
    """The smallest weights, zeroed for good."""

    def measure(self, scene: Scene, budget: int) -> Measurement:
        def values(number: int, indices: torch.Tensor) -> torch.Tensor:
            return -scene.targets[number].parameter.detach().view(-1)[indices].float()

        return Measurement(super().measure(scene, budget).scores, values, frozen=True)


@pytest.mark.parametrize("allocation", ["global", "proportional", "uniform"])
def test_a_static_measured_support_is_the_naive_top_k(allocation: str) -> None:
    model = Net()
    scores = {n: -w.abs() for n, w in _weights(model).items()}
    method = dk.Static(budget=31, heuristic=_Smallest(), allocation=allocation)
    tuner = dk.SparseTuner(model, method, lr=RATE)
    sizes = [len(t.indices) for t in tuner.engine.entries.targets]
    assert sum(sizes) == 31
    if allocation == "global":
        expected = _top(scores, 31)
    else:
        expected = {}
        for (name, score), size in zip(scores.items(), sizes, strict=True):
            expected |= _top({name: score}, size)
    for target in tuner.engine.entries.targets:
        mask = torch.zeros(target.numel, dtype=torch.bool)
        mask[target.indices] = True
        assert torch.equal(mask.view(target.shape), expected[target.name])


def test_static_takes_the_gradients_of_the_first_step_and_no_other() -> None:
    model = Net()
    first = next(_batches(1))
    grads = torch.autograd.grad(_loss(model, first), [*model.parameters()])
    expected = _top(dict(zip(sorted(_weights(model)), [g.abs() for g in grads], strict=True)), 15)
    tuner = _train(model, dk.Static(budget=15, heuristic="gradient"), 4)
    for name, mask in expected.items():
        found = tuner.delta().tensors[name].indices if mask.any() else np.zeros(0)
        np.testing.assert_array_equal(found, mask.flatten().nonzero().flatten().numpy())


@pytest.mark.parametrize("extras", ["c", ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_values_are_set_to_zero_and_stay(
    dtype: torch.dtype, extras: Any, tmp_path: Any
) -> None:
    """The delta is in set mode, and merging its file zeroes exactly the chosen weights."""
    model = Net(dtype)
    before = _weights(model)
    method = dk.Static(budget=40, heuristic=_Zeroing())
    tuner = _train(model, method, 3, weight_decay=0.1, extras=extras)
    delta = tuner.delta()
    dk.save(delta, tmp_path / "d.sdelta")
    fresh = Net(dtype)
    dk.apply(fresh, dk.load(tmp_path / "d.sdelta"))
    assert delta.nnz == 40
    for name, tensor in delta.tensors.items():
        assert tensor.mode == "set"
        chosen = torch.zeros(tensor.numel, dtype=torch.bool)
        chosen[torch.from_numpy(tensor.indices)] = True
        expected = before[name].flatten().masked_fill(chosen, 0.0).view(before[name].shape)
        for found in (model, fresh):
            assert torch.equal(found.get_parameter(name), expected)
            assert not torch.signbit(found.get_parameter(name).flatten()[chosen]).any()


class _OnlyA(_Smallest):
    """Nothing outside the first tensor may be chosen."""

    def measure(self, scene: Scene, budget: int) -> Measurement:
        def scores(number: int) -> torch.Tensor:
            size = scene.targets[number].parameter.detach().abs()
            return size if number == 0 else torch.full_like(size, -torch.inf)

        return Measurement(scores)


def test_entries_that_score_minus_infinity_are_never_chosen() -> None:
    tuner = dk.SparseTuner(Net(), dk.Static(budget=120, heuristic=_OnlyA()))
    assert [len(t.indices) for t in tuner.engine.entries.targets] == [120, 0, 0]
    with pytest.raises(BudgetError, match="asks for 121 entries and only 120 may be chosen"):
        dk.SparseTuner(Net(), dk.Static(budget=121, heuristic=_OnlyA()))


def test_requests_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="repeat needs one that scores gradients"):
        dk.Repeat(budget=5, heuristic=_Smallest())
    with pytest.raises(ConfigError, match="allocation cannot be global"):
        dk.DropAndGrow(budget=5, allocation="global")
    with pytest.raises(ConfigError, match="rate must be in"):
        dk.DropAndGrow(budget=5, rate=1.5)
    with pytest.raises(ConfigError, match="unknown heuristic 'gradeint'; nearest: gradient"):
        dk.Static(budget=5, heuristic="gradeint")
    for method in (dk.Repeat(budget=5), dk.Static(budget=5)):
        with pytest.raises(BudgetError, match="has no budget checkpoints"):
            dk.SparseTuner(Net(), method, budget_checkpoints=[2])
    with pytest.raises(BudgetError, match="steps= is missing"):
        dk.SparseTuner(Net(), dk.DropAndGrow(budget=5))


@pytest.mark.parametrize("method", [dk.Increment, dk.Repeat, dk.DropAndGrow])
def test_selections_out_of_range_are_refused(method: Any) -> None:
    with pytest.raises(BudgetError, match="every must be at least 1 step, found 0"):
        method(budget=5, every=0)
    for share in (0.0, 1.5):
        with pytest.raises(BudgetError, match=r"unmask_fraction must be in \(0, 1\], found"):
            method(budget=5, unmask_fraction=share)
