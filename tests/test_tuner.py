"""The training engine: exact budgets, untouched bits, and equality with a naive dense loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.errors import (
    BaseMismatchError,
    BudgetError,
    ConfigError,
    CoordinateError,
    TrainingError,
)
from deltakit.selection.methods import Method

State = dict[str, torch.Tensor]
METHODS: list[Callable[[int], Method]] = [
    lambda budget: dk.ID3(budget=budget, steps=7),
    lambda budget: dk.ID3(budget=budget, steps=7, exp=1.3, schedule="cosine"),
    lambda budget: dk.ID3(budget=budget, steps=5, allocation="proportional", exp=-1.0),
    lambda budget: dk.ID3(budget=budget, steps=5, schedule="once"),
    lambda budget: dk.RandomMask(budget=budget, seed=3),
    lambda budget: dk.RowMask(budget=budget),
    lambda budget: dk.ColumnMask(budget=budget, order="last"),
    lambda budget: dk.BlockMask(budget=budget, block_size=4),
    lambda budget: dk.NMMask(budget=budget, n=2, m=4, pick="largest"),
]


class Net(nn.Module):
    """Every kind of layer that matters: embedding, norm, a layer used twice, an unused one."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(40, 16)
        self.twice = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)
        self.unused = nn.Linear(3, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.twice(torch.tanh(self.twice(self.embed(tokens)))))
        logits: torch.Tensor = self.head(self.norm(hidden).mean(1))
        return logits


def _batches(count: int, size: int = 8) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield (
            torch.randint(0, 40, (size, 5), generator=generator),
            torch.randint(0, 4, (size,), generator=generator),
        )


def _train(model: nn.Module, tuner: dk.SparseTuner, steps: int) -> None:
    for tokens, labels in _batches(steps):
        nn.functional.cross_entropy(model(tokens).float(), labels).backward()
        tuner.step()


def _copy(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _merged(before: State, delta: dk.SparseDelta) -> State:
    """The naive dense merge in torch."""
    merged = {name: tensor.clone() for name, tensor in before.items()}
    for name, tensor in delta.tensors.items():
        dense = torch.zeros(tensor.numel)
        dense[torch.from_numpy(tensor.indices)] = torch.from_numpy(tensor.values)
        sum_ = before[name].float() + dense.reshape(tensor.shape)
        merged[name] = sum_.to(before[name].dtype)
    return merged


def _same(a: State, b: State) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_only_chosen_entries_move_and_the_model_is_the_merge(
    make: Callable[[int], Method], dtype: torch.dtype, decay: float
) -> None:
    """The budget is met exactly, weight decay does not leak, and live bits equal merged bits."""
    model = Net(dtype)
    before = _copy(model)
    tuner = dk.SparseTuner(model, make(100), lr=1e-2, weight_decay=decay)
    _train(model, tuner, 12)
    delta = tuner.delta()
    assert delta.nnz == tuner.unmasked == 100
    after = _copy(model)
    for name, tensor in after.items():
        changed = (tensor != before[name]).flatten().nonzero().flatten().numpy()
        chosen = delta.tensors[name].indices if name in delta.tensors else []
        assert set(changed) <= set(chosen), name
    if dtype != torch.float64:
        assert _same(after, _merged(before, delta))
    assert sum(int((after[n] != before[n]).sum()) for n in after) > 50


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 200])
def test_the_budget_holds_whatever_the_number_of_steps(steps: int) -> None:
    """Neither when it does not divide the budget, nor after the last step, nor above it."""
    model = Net()
    tuner = dk.SparseTuner(model, dk.ID3(budget=100, steps=steps), lr=1e-3)
    reached = []
    for tokens, labels in _batches(min(steps, 40) + 5):
        nn.functional.cross_entropy(model(tokens), labels).backward()
        tuner.step()
        reached.append(tuner.unmasked)
    plan = [100 * (t + 1) // steps for t in range(steps)] + [100] * 5
    assert reached == plan[: len(reached)]


@pytest.mark.parametrize("age", ["entry", "shared"])
@pytest.mark.parametrize("exp", [0.0, 1.0])
def test_id3_equals_a_dense_masked_loop(exp: float, age: str) -> None:
    """Algorithm 1 with dense masks, dense AdamW moments and a dense age per weight."""
    steps, budget, rate, decay = 10, 60, 1e-2, 0.1
    model, dense = Net(), Net()
    tuner = dk.SparseTuner(
        model, dk.ID3(budget=budget, steps=6, exp=exp), lr=rate, weight_decay=decay, age=age
    )
    _train(model, tuner, steps)
    names = sorted(n for n, _ in dense.named_parameters())
    live = dict(dense.named_parameters())
    base = torch.cat([live[n].detach().flatten() for n in names])
    mask, ages = torch.zeros_like(base, dtype=torch.bool), torch.zeros_like(base)
    m, v, value = (torch.zeros_like(base) for _ in range(3))
    for step, (tokens, labels) in enumerate(_batches(steps)):
        dense.zero_grad()
        nn.functional.cross_entropy(dense(tokens), labels).backward()
        grads = [live[n].grad for n in names]
        grad = torch.cat(
            [
                torch.zeros(live[n].numel()) if g is None else g.flatten()
                for n, g in zip(names, grads, strict=True)
            ]
        )
        if step < 6:
            k = budget * (step + 1) // 6 - budget * step // 6
            score = grad.abs() / (1 + base.abs()) ** exp
            score[mask] = -1
            mask[torch.argsort(score, descending=True, stable=True)[:k]] = True
        ages[mask] += 1
        counted = ages if age == "entry" else torch.full_like(ages, step + 1)
        grad = grad * mask
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        safe = counted.clamp(min=1).double()
        update = (m / (1 - 0.9**safe)) / ((v / (1 - 0.999**safe)).sqrt() + 1e-8)
        value = torch.where(mask, value * (1 - rate * decay) - rate * update, 0.0).float()
        with torch.no_grad():
            parts = (base + value).split([live[n].numel() for n in names])
            for n, part in zip(names, parts, strict=True):
                live[n].copy_(part.view_as(live[n]))
    delta = tuner.delta()
    offset = 0
    for n in names:
        chosen = mask[offset : offset + live[n].numel()].nonzero().flatten().numpy()
        found = delta.tensors[n].indices if n in delta.tensors else np.zeros(0)
        np.testing.assert_array_equal(found, chosen, err_msg=n)
        offset += live[n].numel()
    for n, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), live[n].detach(), rtol=1e-4, atol=1e-6)


def _travel(age: str, late: int) -> list[float]:
    """How far an entry moves per step, in units of lr, when unmasked at step `late`."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0]]))
    method = dk.ID3(budget=2, steps=late + 1, schedule=[1] + [0] * (late - 1) + [1])
    tuner = dk.SparseTuner(model, method, lr=1.0, age=age, adam_eps=0.0)
    moved, before = [], 0.0
    for _ in range(late + 40):
        model(torch.tensor([[2.0, 1.0]])).sum().backward()
        tuner.step()
        now = float(model.weight[0, 1].detach())
        moved.append(before - now)
        before = now
    return moved[late:]


def test_late_entries_start_at_the_learning_rate_only_with_their_own_age() -> None:
    """With a shared step count an entry unmasked at step 1000 is over-driven; its age cures it."""
    own, shared = _travel("entry", 1000), _travel("shared", 1000)
    np.testing.assert_allclose(own, 1.0, rtol=1e-3)
    assert shared[0] == pytest.approx(2.5, abs=0.1)
    assert max(shared) == pytest.approx(5.2, abs=0.1)
    assert sum(shared) / sum(own) == pytest.approx(4.6, abs=0.1)


def test_small_updates_survive_in_bfloat16() -> None:
    """A bfloat16 weight near 1 swallows steps of 1e-4; the compact value does not."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    tuner = dk.SparseTuner(model, dk.RandomMask(budget=1), lr=1e-4)
    for _ in range(100):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        tuner.step()
    delta = tuner.delta().tensors["weight"]
    np.testing.assert_allclose(delta.values, -1e-2, rtol=1e-3)
    assert model.weight.item() == torch.tensor(1 - 1e-2).bfloat16().item()


def test_weight_decay_pulls_the_delta_to_the_base() -> None:
    model = nn.Linear(4, 1, bias=False)
    tuner = dk.SparseTuner(model, dk.RandomMask(budget=4), lr=0.1, weight_decay=0.5)
    model(torch.ones(1, 4)).sum().backward()
    tuner.step()
    first = tuner.delta().tensors["weight"].values.copy()
    (0.0 * model(torch.ones(1, 4)).sum()).backward()
    with torch.no_grad():
        for moment in ("exp_avg", "exp_avg_sq"):
            tuner.optimizer.state[tuner.engine.entries.values][moment].zero_()
    tuner.step()
    np.testing.assert_allclose(tuner.delta().tensors["weight"].values, first * 0.95, rtol=1e-6)


def test_accumulated_micro_batches_select_on_their_sum() -> None:
    """Two halves select and update as the whole batch does; a short last window counts too."""
    whole, halves = Net(torch.float64), Net(torch.float64)
    one = dk.SparseTuner(whole, dk.ID3(budget=50, steps=4), lr=1e-2)
    two = dk.SparseTuner(halves, dk.ID3(budget=50, steps=4), lr=1e-2, accumulation_steps=3)
    for tokens, labels in _batches(6):
        nn.functional.cross_entropy(whole(tokens), labels).backward()
        one.step()
        for rows in (slice(0, 4), slice(4, 8)):
            (nn.functional.cross_entropy(halves(tokens[rows]), labels[rows]) / 2).backward()
        two.step()
    a, b = one.delta(), two.delta()
    assert list(a.tensors) == list(b.tensors)
    for name, tensor in a.tensors.items():
        np.testing.assert_array_equal(tensor.indices, b.tensors[name].indices)
        np.testing.assert_array_equal(tensor.order, b.tensors[name].order)
        np.testing.assert_allclose(tensor.values, b.tensors[name].values, rtol=1e-9)


def test_an_unannounced_second_backward_is_refused_while_selecting() -> None:
    model = Net()
    dk.SparseTuner(model, dk.ID3(budget=10, steps=5))
    tokens, _ = next(_batches(1))
    model(tokens).sum().backward()
    with pytest.raises(TrainingError, match="accumulation_steps=1"):
        model(tokens).sum().backward()


def test_no_dense_gradient_outlives_backward_and_frozen_tensors_have_none() -> None:
    model = Net()
    tuner = dk.SparseTuner(model, dk.ID3(budget=30, steps=2), target=["twice", "head"])
    for tokens, labels in _batches(4):
        nn.functional.cross_entropy(model(tokens), labels).backward()
        assert all(p.grad is None for p in model.parameters())
        tuner.step()
    assert not model.embed.weight.requires_grad
    assert {n.split(".")[0] for n in tuner.delta().tensors} <= {"twice", "head"}
    tuner.close()
    assert all(p.requires_grad for p in model.parameters())


def test_clipping_sees_chosen_entries_and_extras_only() -> None:
    model = Net()
    tuner = dk.SparseTuner(
        model, dk.RandomMask(budget=20), target="twice", extras="head", max_grad_norm=1e-3
    )
    tokens, labels = next(_batches(1))
    nn.functional.cross_entropy(model(tokens), labels).backward()
    entries = tuner.engine.entries.gradient.clone()
    extras = [e.parameter.grad.clone() for e in tuner.engine.extras if e.parameter.grad is not None]
    expected = torch.linalg.vector_norm(torch.cat([entries, *(e.flatten() for e in extras)]))
    assert tuner.engine.finish_gradients() == pytest.approx(float(expected), rel=1e-6)
    clipped = tuner.engine.entries.gradient
    torch.testing.assert_close(clipped, entries * (1e-3 / (expected + 1e-6)))


def test_extras_train_densely_at_their_own_rate() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = Net(dtype)
        before = _copy(model)
        tuner = dk.SparseTuner(
            model, dk.ID3(budget=20, steps=3), lr=0.0, extras="head", extras_lr=1e-2
        )
        _train(model, tuner, 5)
        delta = tuner.delta()
        assert list(delta.extras) == ["head.bias", "head.weight"]
        assert delta.nnz == 20 and delta.extra_weights == 68
        head = torch.from_numpy(delta.extras["head.weight"].astype(np.float32))
        assert torch.equal(model.head.weight.detach().float(), head)
        assert bool((model.head.weight != before["head.weight"]).all())
        assert torch.equal(model.twice.weight, before["twice.weight"])  # lr 0


@pytest.mark.parametrize("make", METHODS)
def test_resuming_gives_the_same_bits(make: Callable[[int], Method]) -> None:
    straight = Net()
    tuner = dk.SparseTuner(straight, make(80), lr=1e-2, extras="head", weight_decay=0.1)
    states = []
    for step, (tokens, labels) in enumerate(_batches(10)):
        if step == 4:
            states.append(deepcopy(tuner.state_dict()))  # torch's own part is not a copy
        nn.functional.cross_entropy(straight(tokens), labels).backward()
        tuner.step()
    resumed = Net()
    again = dk.SparseTuner(resumed, make(80), lr=1e-2, extras="head", weight_decay=0.1)
    _train(resumed, again, 1)  # what happened before loading must not matter
    again.load_state_dict(states[0])
    for step, (tokens, labels) in enumerate(_batches(10)):
        if step >= 4:
            nn.functional.cross_entropy(resumed(tokens), labels).backward()
            again.step()
    assert _same(_copy(straight), _copy(resumed))
    assert tuner.delta().equals(again.delta())


def test_training_continues_from_a_delta_on_the_base() -> None:
    model = Net()
    first = dk.SparseTuner(model, dk.ID3(budget=40, steps=4), lr=1e-2, extras="head")
    _train(model, first, 6)
    start = first.delta()
    fresh = Net()
    second = dk.SparseTuner(
        fresh, dk.ID3(budget=70, steps=3), lr=1e-2, extras="head", init_delta=start
    )
    assert _same(_copy(model), _copy(fresh))
    _train(fresh, second, 5)
    delta = second.delta()
    assert delta.nnz == 70
    for name, tensor in start.tensors.items():
        grown = delta.tensors[name]
        at = np.searchsorted(grown.indices, tensor.indices)
        np.testing.assert_array_equal(grown.indices[at], tensor.indices)
        assert tensor.order is not None and grown.order is not None
        np.testing.assert_array_equal(grown.order[at], tensor.order)
    nested = dk.truncate(delta, 40, by="order")
    assert all(
        np.array_equal(t.indices, nested.tensors[n].indices) for n, t in start.tensors.items()
    )


@pytest.mark.parametrize("make", METHODS)
def test_another_deltas_support_stays_clear(make: Callable[[int], Method]) -> None:
    model = Net()
    first = dk.SparseTuner(model, make(300), lr=1e-2)
    _train(model, first, 8)
    other = first.delta()
    fresh = Net()
    second = dk.SparseTuner(fresh, make(400), lr=1e-2, avoid=[other])
    _train(fresh, second, 8)
    delta = second.delta()
    assert delta.nnz == 400
    for name, tensor in delta.tensors.items():
        if name in other.tensors:
            assert not np.intersect1d(tensor.indices, other.tensors[name].indices).size


def test_random_masks_depend_on_seed_and_tensor_only() -> None:
    supports = {}
    for seed in (0, 0, 1):
        tuner = dk.SparseTuner(Net(), dk.RandomMask(budget=200, seed=seed))
        tensors = tuner.delta().tensors
        supports.setdefault(seed, []).append({n: t.indices.tolist() for n, t in tensors.items()})
        assert all(t.seed == seed for t in tensors.values())
    assert supports[0][0] == supports[0][1] != supports[1][0]


def test_tied_weights_are_one_tensor() -> None:
    model = Net()
    model.tied = nn.Linear(16, 40, bias=False)
    model.tied.weight = model.embed.weight
    tuner = dk.SparseTuner(model, dk.ID3(budget=10, steps=1), target="embed")
    for tokens, _ in _batches(2):
        model.tied(model.embed(tokens)).square().sum().backward()
        tuner.step()
    assert list(tuner.delta().tensors) == ["embed.weight"]
    assert model.tied.weight is model.embed.weight


def test_batch_norm_statistics_travel_as_extras() -> None:
    """Buffers that training changes are part of the model that was evaluated."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    before = _copy(model)
    tuner = dk.SparseTuner(model, dk.RandomMask(budget=20), lr=1e-2)
    generator = torch.Generator().manual_seed(4)
    for step in range(6):
        if step == 3:
            state = deepcopy(tuner.state_dict())
        model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        tuner.step()
    delta = tuner.delta()
    assert list(delta.extras) == ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
    fresh = deepcopy(model)
    fresh.load_state_dict(before)
    with dk.applied(fresh, delta):
        assert _same(_copy(model), _copy(fresh))
    assert _same(before, _copy(fresh))
    tuner.load_state_dict(state)
    assert int(model[1].num_batches_tracked) == 3


def test_bad_requests_are_refused_before_anything_changes() -> None:
    model = Net()
    before, flags = _copy(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ConfigError, match="target pattern 'twyce' matches no tensor; nearest: twi"):
        dk.SparseTuner(model, dk.ID3(budget=10, steps=1), target="twyce")
    with pytest.raises(BudgetError, match="budget 5000 cannot be met: 0 entries are taken"):
        dk.SparseTuner(model, dk.ID3(budget=5000, steps=1))
    with pytest.raises(BudgetError, match="steps= is missing, the number of steps"):
        dk.SparseTuner(model, dk.ID3(budget=10))
    with pytest.raises(BudgetError, match="no budget checkpoints; truncate"):
        dk.SparseTuner(model, dk.RandomMask(budget=10), budget_checkpoints=[5])
    with pytest.raises(BudgetError, match="at least 1"):
        dk.ID3(budget=0)
    with pytest.raises(ConfigError, match="no tensor is left"):
        dk.SparseTuner(model, dk.ID3(budget=1, steps=1), target="head", extras="head")
    with pytest.raises(ConfigError, match="age must be entry or shared"):
        dk.SparseTuner(model, dk.ID3(budget=1, steps=1), age="own")  # type: ignore[arg-type]
    assert _same(before, _copy(model))
    assert flags == [p.requires_grad for p in model.parameters()]


def test_a_delta_of_another_model_is_refused() -> None:
    model = Net()
    tuner = dk.SparseTuner(model, dk.ID3(budget=40, steps=1), lr=1e-2)
    _train(model, tuner, 2)
    delta = tuner.delta()
    other = Net()
    with torch.no_grad():
        other.twice.weight.add_(0.1)
    with pytest.raises(BaseMismatchError, match=r"tensor 'twice\.weight': the delta belongs to an"):
        dk.SparseTuner(other, dk.ID3(budget=50, steps=1), init_delta=delta)
    with pytest.raises(CoordinateError, match="is no target of this run"):
        dk.SparseTuner(Net(), dk.ID3(budget=50, steps=1), init_delta=delta, target="head")
    with pytest.raises(ConfigError, match="more than the budget 30"):
        dk.SparseTuner(Net(), dk.ID3(budget=30, steps=1), init_delta=delta)
