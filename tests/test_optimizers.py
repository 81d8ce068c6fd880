"""Any optimizer drives compact entries: equality with the dense optimizer, budgets, resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.errors import ConfigError
from deltakit.selection.methods import Method
from deltakit.training.entry_optimizer import reset_state
from deltakit.training.optimizer_choice import optimizer_names

RATE, STEPS = 0.03, 9
OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "nesterov": True},
    "rmsprop": {"momentum": 0.5, "centered": True},
    "adagrad": {"initial_accumulator_value": 0.1},
    "adafactor": {"eps": (None, 1.0)},
}
# adamw is the default and has tests of its own; 8-bit states need bitsandbytes.
NAMES = [name for name in optimizer_names() if name not in ("adamw", "adamw8bit")]


class Net(nn.Module):
    """Two layers and a head, in float64 so that only the arithmetic is compared."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return logits


def _losses(model: nn.Module, steps: int = STEPS, start: int = 0) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        x = torch.randn(10, 6, generator=generator)
        labels = torch.randint(0, 3, (10,), generator=generator)
        if step >= start:
            yield nn.functional.cross_entropy(model(x.to(dtype)), labels)


def _tuner(model: nn.Module, name: str, method: Method, **more: Any) -> dk.SparseTuner:
    options = OPTIONS.get(name)
    extras = more.pop("extras", "head")
    return dk.SparseTuner(
        model,
        method,
        optimizer=name,
        optimizer_options=options,
        lr=RATE,
        extras=extras,
        extras_lr=RATE / 2,
        **more,
    )


def _dense_reference(
    name: str, masks: Callable[[int], Mapping[str, torch.Tensor]], decay: float
) -> Net:
    """The dense optimizer of torch on whole deltas, whose gradients are masked."""
    model = Net()
    live = dict(model.named_parameters())
    base = {n: p.detach().clone() for n, p in live.items()}
    deltas = {n: nn.Parameter(torch.zeros_like(p)) for n, p in live.items() if "head" not in n}
    heads = [p for n, p in live.items() if "head" in n]
    groups = [
        {"params": list(deltas.values()), "lr": RATE, "weight_decay": decay},
        {"params": heads, "lr": RATE / 2, "weight_decay": 0.0},
    ]
    classes = {n.lower(): c for n, c in vars(torch.optim).items()}
    optimizer = classes[name](groups, lr=RATE, **OPTIONS.get(name, {}))
    for step, loss in enumerate(_losses(model)):
        model.zero_grad()
        loss.backward()
        for n, delta in deltas.items():
            assert live[n].grad is not None
            delta.grad = live[n].grad * masks(step)[n]
        optimizer.step()
        with torch.no_grad():
            for n, delta in deltas.items():
                live[n].copy_(base[n] + delta)
    return model


def _masks(tuner: dk.SparseTuner) -> Callable[[int], Mapping[str, torch.Tensor]]:
    """Who is in training at a step, from the orders of the trained delta."""
    tensors = tuner.delta().tensors
    shapes = {n: p.shape for n, p in tuner.model.named_parameters()}

    def at(step: int) -> dict[str, torch.Tensor]:
        masks = {n: torch.zeros(shape).flatten() for n, shape in shapes.items()}
        for n, tensor in tensors.items():
            indices = torch.from_numpy(tensor.indices)
            if tensor.order is not None:
                indices = indices[torch.from_numpy(tensor.order) <= step]
            masks[n][indices] = 1
        return {n: mask.view(shapes[n]) for n, mask in masks.items()}

    return at


def _train(tuner: dk.SparseTuner, **span: int) -> None:
    for loss in _losses(tuner.model, **span):
        loss.backward()
        tuner.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "adafactor"])
def test_entries_move_as_under_the_dense_optimizer(name: str, growing: bool, decay: float) -> None:
    """With masked gradients, in float64, whether the support is fixed or grows."""
    if name == "rprop" and decay:
        with pytest.raises(ConfigError, match="optimizer Rprop has no weight decay"):
            _tuner(Net(), name, dk.RandomMask(budget=50), weight_decay=decay)
        return
    method = dk.ID3(budget=50, steps=6) if growing else dk.RandomMask(budget=50)
    model = Net()
    tuner = _tuner(model, name, method, weight_decay=decay)
    _train(tuner)
    reference = _dense_reference(name, _masks(tuner), decay)
    near = 1e-6 if growing else 1e-12  # an entry's first gradient comes through float32 scores
    for found, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=near, atol=near)
    assert tuner.delta().nnz == 50


def test_adafactor_measures_entries_in_training_only() -> None:
    """On a growing support as Adafactor on one vector that grows; its state starts from zero."""
    model = Net()
    tuner = _tuner(model, "adafactor", dk.ID3(budget=50, steps=6), target="second", extras=())
    values, variance = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    entries = tuner.engine.entries
    for step, loss in enumerate(_losses(model)):
        loss.backward()
        tuner.engine.finish_gradients()
        count, gradient = entries.count, entries.gradient.clone()
        fresh = torch.zeros(count - len(values), dtype=torch.float64)
        values, variance = torch.cat([values, fresh]), torch.cat([variance, fresh])
        gradient = gradient[:count]
        variance = variance.lerp(gradient**2, (step + 1.0) ** -0.8)
        update = gradient / variance.clamp(min=torch.finfo(torch.float64).eps ** 2).sqrt()
        rate = min(RATE, (step + 1) ** -0.5) * max(1.0, float(values.square().mean().sqrt()))
        values = values - rate * update / max(1.0, float(update.square().mean().sqrt()))
        tuner.step()
        torch.testing.assert_close(entries.values.detach()[:count], values, rtol=1e-9, atol=1e-12)
        assert not entries.values[count:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_exact_budget_and_untouched_bits(name: str, dtype: torch.dtype) -> None:
    for method in (dk.ID3(budget=40, steps=5), dk.RandomMask(budget=40)):
        model = Net(dtype)
        before = deepcopy(model.state_dict())
        tuner = _tuner(model, name, method, max_grad_norm=1.0)
        _train(tuner)
        delta = tuner.delta()
        assert delta.nnz == 40
        assert not tuner.engine.entries.values[tuner.unmasked :].any()
        for n, after in model.state_dict().items():
            changed = (after != before[n]).flatten().nonzero().flatten()
            if "head" not in n:
                chosen = delta.tensors[n].indices if n in delta.tensors else []
                assert set(changed.tolist()) <= set(chosen), n
        assert int(tuner.engine.entries.values.count_nonzero()) > 20  # bfloat16 hides small ones
        tuner.close()
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", [*NAMES, "adamw"])
@pytest.mark.parametrize("growing", [False, True])
def test_resuming_gives_the_same_bits(name: str, growing: bool) -> None:
    """A scheduler's rate included; what happened before loading does not matter."""
    method = dk.ID3(budget=40, steps=7) if growing else dk.RandomMask(budget=40)
    straight = _tuner(Net(torch.float32), name, method)
    _train(straight, steps=4)
    straight.optimizer.param_groups[0]["lr"] = RATE / 3
    state = deepcopy(straight.state_dict())
    _train(straight, steps=STEPS, start=4)
    resumed = _tuner(Net(torch.float32), name, method)
    _train(resumed, steps=2)
    resumed.load_state_dict(state)
    assert resumed.optimizer.param_groups[0]["lr"] == RATE / 3
    _train(resumed, steps=STEPS, start=4)
    assert straight.delta().equals(resumed.delta())


def test_schedulers_drive_the_inner_optimizer() -> None:
    tuner = _tuner(Net(), "sgd", dk.RandomMask(budget=40))
    schedule = torch.optim.lr_scheduler.LambdaLR(tuner.optimizer, lambda step: float(step < 2))
    seen = []
    for loss in _losses(tuner.model, steps=4):
        loss.backward()
        before = tuner.engine.entries.values.detach().clone()
        tuner.step()
        schedule.step()
        seen.append(not torch.equal(before, tuner.engine.entries.values))
    assert seen == [True, True, False, False]


def test_classes_and_factories_do_as_names_do() -> None:
    deltas = []
    for optimizer in ("sgd", torch.optim.SGD, lambda groups, lr: torch.optim.SGD(groups, lr=lr)):
        tuner = dk.SparseTuner(Net(), dk.RandomMask(budget=40), optimizer=optimizer, lr=RATE)
        _train(tuner)
        deltas.append(tuner.delta())
    assert deltas[0].equals(deltas[1]) and deltas[0].equals(deltas[2])


def test_adamw_of_torch_equals_the_default_on_a_fixed_support() -> None:
    options = {"eps": 1e-8, "betas": (0.9, 0.999)}
    ours = dk.SparseTuner(Net(), dk.RandomMask(budget=40), lr=RATE, weight_decay=0.1)
    other = dk.SparseTuner(
        Net(),
        dk.RandomMask(budget=40),
        lr=RATE,
        weight_decay=0.1,
        optimizer=torch.optim.AdamW,
        optimizer_options=options,
    )
    _train(ours)
    _train(other)
    found = (ours.engine.entries.values, other.engine.entries.values)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adamw", "adafactor", "adam"])
def test_a_replaced_entry_inherits_no_state(name: str) -> None:
    """Its slots are zero in every state tensor shaped like the values; the others keep theirs."""
    tuner = _tuner(Net(), name, dk.RandomMask(budget=40))
    _train(tuner, steps=3)
    slots = torch.tensor([3, 17])
    tuner.engine.scoring.renewed = slots
    states = [s for p, s in tuner.optimizer.state.items() if p.numel() == 40]
    before = [t.clone() for t in states[0].values() if torch.is_tensor(t) and t.shape == (40,)]
    after = tuner.state_dict()["state"][0]
    after = [t for t in after.values() if torch.is_tensor(t) and t.shape == (40,)]
    assert len(before) == len(after) > 0
    keep = torch.ones(40, dtype=torch.bool)
    keep[slots] = False
    for old, new in zip(before, after, strict=True):
        assert old[slots].any() and not new[slots].any()
        assert torch.equal(old[keep], new[keep])
    assert len(tuner.engine.scoring.renewed) == 0


def test_what_cannot_drive_entries_is_refused() -> None:
    def made(optimizer: Any, **options: Any) -> dk.SparseTuner:
        return dk.SparseTuner(
            Net(), dk.RandomMask(budget=4), optimizer=optimizer, optimizer_options=options
        )

    with pytest.raises(ConfigError, match="unknown optimizer 'sgdd'; nearest: sgd"):
        made("sgdd")
    with pytest.raises(ConfigError, match="LBFGS evaluates the loss more than once per step"):
        made(torch.optim.LBFGS)
    with pytest.raises(ConfigError, match="SparseAdam wants sparse tensors"):
        made(torch.optim.SparseAdam)
    if hasattr(torch.optim, "Muon"):
        with pytest.raises(ConfigError, match="Muon cannot be made: Muon only supports 2D"):
            made(torch.optim.Muon)
    with pytest.raises(ConfigError, match=r"SGD cannot be made: .*unexpected keyword.*'betas'"):
        made("sgd", betas=(0.9, 0.99))
    with pytest.raises(ConfigError, match="optimizer adamw has no option 'momentum'"):
        made("adamw", momentum=0.9)
    with pytest.raises(ConfigError, match="lr has an argument of its own"):
        made("sgd", lr=0.1)


def test_eight_bit_adam() -> None:
    """Trains, keeps unused places at zero, resumes, and forgets renewed entries."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    assert bitsandbytes is not None
    rows = 5000  # bitsandbytes keeps 32-bit states below 4096 numbers

    def trained(steps: int, state: Any = None) -> dk.SparseTuner:
        torch.manual_seed(0)
        model = nn.Linear(100, 100)
        method = dk.ID3(budget=rows, steps=4)
        tuner = dk.SparseTuner(model, method, optimizer="adamw8bit", lr=1e-2)
        if state is not None:
            tuner.load_state_dict(state)
        generator = torch.Generator().manual_seed(1)
        for step in range(6):
            x = torch.randn(8, 100, generator=generator)
            if tuner.engine.step <= step < steps:
                model(x).square().mean().backward()
                tuner.step()
                assert not tuner.engine.entries.values[tuner.unmasked :].any()
        return tuner

    straight, half = trained(6), trained(3)
    moments = half.optimizer.state[half.engine.entries.values]
    assert moments["state1"].dtype == torch.uint8
    assert trained(6, deepcopy(half.state_dict())).delta().equals(straight.delta())
    slots = torch.arange(10)
    reset_state(half.optimizer, half.engine.entries.values, slots)
    for n in ("1", "2"):
        assert not moments[f"qmap{n}"][moments[f"state{n}"][slots].long()].any()
