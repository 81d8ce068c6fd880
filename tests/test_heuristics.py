"""Heuristics against naive dense references, and the laws that all of them keep."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import deltakit as dk
from deltakit.errors import BudgetError, ConfigError, DataError, TrainingError
from deltakit.selection import HEURISTICS, METHODS, Static
from deltakit.selection.calibrated import Calibrated
from deltakit.selection.child_tuning_f import ChildTuningF
from deltakit.selection.diff_pruning import DiffPruning
from deltakit.selection.fisher import Fisher
from deltakit.selection.gradient import Gradient
from deltakit.selection.grasp import Grasp
from deltakit.selection.heuristics import Measure, Measurement, StepScore
from deltakit.selection.lt_sft import LotteryTicket
from deltakit.selection.magnitude import LargestMagnitude, SmallestMagnitude
from deltakit.selection.s_bitfit import SBitFit
from deltakit.selection.sam import SAM
from deltakit.selection.scene import Scene
from deltakit.selection.snip import Snip
from deltakit.selection.threshold_mask import ThresholdMask
from deltakit.selection.u_bitfit import UBitFit
from deltakit.training.calibration import Batches
from deltakit.training.entries import Target

Scores = dict[str, torch.Tensor]
CLASSES, STEPS, RATE = 3, 5, 1e-2


class Net(nn.Module):
    """Attention, a layer used twice, a norm, a batch norm, dropout and an unused layer."""

    def __init__(self, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(20, 6)
        self.twice = nn.Linear(6, 6)
        self.batch_norm = nn.BatchNorm1d(6)
        self.ln_f = nn.LayerNorm(6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6, CLASSES)
        self.unused = nn.Linear(2, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.twice(torch.tanh(self.twice(self.embed(tokens)))))
        hidden = scaled_dot_product_attention(hidden, hidden, hidden)
        hidden = self.batch_norm(self.dropout(hidden).mean(1))
        logits: torch.Tensor = self.head(self.ln_f(hidden))
        return logits


def _data(count: int = 4, size: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(0, 20, (size, 4), generator=generator),
            torch.randint(0, CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return cross_entropy(model(batch[0]).double(), batch[1])


def _calibration(count: int = 4) -> Batches:
    return Batches(_data(count), _loss, lambda model, batch: model(batch[0]))


def _scene(model: nn.Module, extras: tuple[str, ...] = (), total_steps: int = STEPS) -> Scene:
    live = dict(model.named_parameters())
    names = sorted(set(live) - set(extras))
    return Scene(
        targets=[Target(i, name, name, live[name]) for i, name in enumerate(names)],
        total_steps=total_steps,
        extras=[live[name] for name in extras],
        model=model,
        calibration=_calibration(),
    )


def _scores(measurement: Measurement, scene: Scene) -> Scores:
    return {t.name: measurement.scores(t.number).view(t.shape) for t in scene.targets}


def _gradients(model: nn.Module, batch: Any) -> Scores:
    model.zero_grad()
    _loss(model.eval(), batch).backward()
    return _filled(model)


def _filled(model: nn.Module) -> Scores:
    zero = torch.zeros_like
    return {n: zero(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def _summed(model: nn.Module, count: int, seed: int = 0) -> Scores:
    batches = _calibration().batches(seed)
    parts = [_gradients(model, next(batches)) for _ in range(count)]
    return {n: torch.stack([part[n] for part in parts]).sum(0) for n in parts[0]}


def _weights(model: nn.Module) -> Scores:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def _top(scores: Scores, k: int) -> dict[str, set[int]]:
    """The k highest, which must stand clear of the rest."""
    names = sorted(scores)
    flat = torch.cat([scores[n].flatten() for n in names]).double()
    order = torch.sort(flat, descending=True, stable=True)
    last, next_ = order.values[k - 1].item(), order.values[k].item()
    assert last - next_ > 1e-6 * abs(last), "the reference has a tie at the budget"
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order.indices[:k]] = True
    parts = mask.split([scores[n].numel() for n in names])
    chosen = {n: set(part.nonzero().flatten().tolist()) for n, part in zip(names, parts)}  # noqa: B905
    return {n: indices for n, indices in chosen.items() if indices}


def _clear_budget(scores: Scores, least: int) -> int:
    """The first budget from `least` on whose last entry stands clear of the next."""
    flat = torch.cat([s.flatten() for s in scores.values()]).double().sort(descending=True).values
    gaps = flat[:-1] - flat[1:] > 1e-6 * flat[:-1].abs()
    return least + int(gaps[least - 1 :].nonzero()[0])


def _chosen(delta: dk.SparseDelta) -> dict[str, set[int]]:
    return {name: set(tensor.indices.tolist()) for name, tensor in delta.tensors.items()}


# ---- scores of a step


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
    batch = _data(1)[0]
    grads, weights = _gradients(Net(), batch), _weights(model)
    tuner = dk.SparseTuner(model.eval(), Static(budget=25, heuristic=heuristic))
    _loss(model, batch).backward()
    tuner.step()
    expected = _top({n: reference(grads[n], weights[n]) for n in grads}, 25)
    assert _chosen(tuner.delta()) == expected


# ---- scores measured before training


def _per_example(model: nn.Module, count: int, power: Callable[[torch.Tensor], Any]) -> Scores:
    rows = [(x[i : i + 1], y[i : i + 1]) for x, y in _data() for i in range(len(x))][:count]
    parts = [_gradients(model, row) for row in rows]
    return {n: sum(power(part[n]) for part in parts) for n in parts[0]}


def _expected_fisher(model: nn.Module, square: bool) -> Scores:
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    rows = [x[i : i + 1] for x, _ in _data() for i in range(len(x))]
    for x in rows[:7]:
        shares = model.eval()(x).softmax(-1)[0].detach()
        for label in range(CLASSES):
            grads = _gradients(model, (x, torch.tensor([label])))
            for n, g in grads.items():
                total[n] += shares[label] * (g.square() if square else g.abs())
    return total


def _drawn_fisher(model: nn.Module) -> Scores:
    rows = [x[i : i + 1] for x, _ in _data() for i in range(len(x))][:7]
    with torch.no_grad():
        shares = [model.eval()(x).float().softmax(-1) for x in rows]
    torch.manual_seed(4)
    labels = [torch.multinomial(share, 1)[0] for share in shares]
    parts = [_gradients(model, row) for row in zip(rows, labels, strict=True)]
    return {n: sum(p[n].square() for p in parts) for n in parts[0]}


def _hessian_scores(model: nn.Module) -> Scores:
    """w * (H g) with the full Hessian of the mean loss over two batches."""
    model.eval()
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    batches = _calibration().batches(0)
    pair = [next(batches) for _ in range(2)]

    def loss(vector: torch.Tensor) -> torch.Tensor:
        parts = [v.view(s) for v, s in zip(vector.split(sizes), shapes, strict=True)]
        named = dict(zip(names, parts, strict=True))
        logits = [torch.func.functional_call(model, named, (x,)) for x, _ in pair]
        return sum(cross_entropy(z, y) for z, (_, y) in zip(logits, pair, strict=True))  # type: ignore[return-value]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, flat)
        gradient = torch.autograd.functional.jacobian(loss, flat)
    scores = flat * (hessian @ gradient)
    parts = [v.view(s) for v, s in zip(scores.split(sizes), shapes, strict=True)]
    return dict(zip(names, parts, strict=True))


def _dense(model: nn.Module, steps: int, change: Any = None, start: Scores | None = None) -> Scores:
    """Plain AdamW over everything, its rate falling linearly; the weights afterwards."""
    live = dict(model.train().named_parameters())
    if start is not None:
        with torch.no_grad():
            for n, p in live.items():
                p.copy_(start[n])
    optimizer = torch.optim.AdamW([live[n] for n in sorted(live)], lr=RATE, weight_decay=0.0)
    batches = _calibration().batches(0)
    torch.manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        optimizer.zero_grad()
        _loss(model, next(batches)).backward()
        for n in sorted(live):
            if change is not None and live[n].grad is not None:
                live[n].grad = change(n, live[n].grad)
        optimizer.step()
    return _weights(model)


def _moved(model: nn.Module) -> Scores:
    before = _weights(model)
    after = _dense(model, STEPS)
    return {n: (after[n] - before[n]).abs() for n in before}


def _random_children(model: nn.Module) -> Scores:
    before = _weights(model)
    after = _dense(model, STEPS, lambda n, g: g * (torch.rand_like(g) < 0.4) / 0.4)
    return {n: (after[n] - before[n]).abs() for n in before}


def _vector_sums(model: nn.Module) -> Scores:
    biases = {"head.bias", "twice.bias", "unused.bias"}
    grads, weights = _summed(model, 2), _weights(model)
    return {
        n: torch.full_like(w, (-w * grads[n]).sum().item() if n in biases else -torch.inf)
        for n, w in weights.items()
    }


PHASE: dict[str, Any] = {"dense_steps": STEPS, "dense_lr": RATE}
MEASURES: dict[str, tuple[Measure, Callable[[Net], Scores]]] = {
    "magnitude-smallest": (
        SmallestMagnitude(),
        lambda m: {n: -w.abs() for n, w in _weights(m).items()},
    ),
    "magnitude-largest": (
        LargestMagnitude(),
        lambda m: {n: w.abs() for n, w in _weights(m).items()},
    ),
    "gradient over batches": (
        Calibrated(Gradient(), 3),
        lambda m: {n: g.abs() for n, g in _summed(m, 3).items()},
    ),
    "snip over batches": (
        Calibrated(Snip(), 6, seed=2),  # more batches than there are: a second pass
        lambda m: {n: (g * m.get_parameter(n).detach()).abs() for n, g in _summed(m, 6, 2).items()},
    ),
    "u-bitfit over batches": (
        Calibrated(UBitFit(), 2),
        lambda m: {
            n: (-g * m.get_parameter(n).detach()).clamp(min=0) for n, g in _summed(m, 2).items()
        },
    ),
    "fisher": (Fisher(), lambda m: _per_example(m, 20, torch.square)),
    "fisher of all": (Fisher(num_samples=None), lambda m: _per_example(m, 20, torch.square)),
    "fisher of few, absolute": (
        Fisher(num_samples=7, square=False),
        lambda m: _per_example(m, 7, torch.abs),
    ),
    "fisher expected": (
        Fisher(num_samples=7, labels="expected"),
        lambda m: _expected_fisher(m, True),  # noqa: FBT003
    ),
    "fisher expected, absolute": (
        Fisher(num_samples=7, labels="expected", square=False),
        lambda m: _expected_fisher(m, False),  # noqa: FBT003
    ),
    "fisher of the model": (Fisher(num_samples=7, labels="model", seed=4), _drawn_fisher),
    "grasp": (Grasp(num_batches=2), _hessian_scores),
    "s-bitfit": (SBitFit(num_batches=2), _vector_sums),
    "lt-sft": (LotteryTicket(**PHASE), _moved),
    "child-tuning-f": (ChildTuningF(**PHASE, probability=0.4), _random_children),
    "child-tuning-f of all": (ChildTuningF(**PHASE, probability=1.0), _moved),
}


@pytest.mark.parametrize("name", MEASURES)
def test_measured_scores_equal_a_naive_dense_reference(name: str) -> None:
    """The model is float64, so that only rounding tells them apart; the chosen are the same."""
    heuristic, reference = MEASURES[name]
    model = Net()
    scene = _scene(model)
    # Scores of step gradients, and shares of labels, are float32.
    tolerance = 1e-5 if "expected" in name or "model" in name else 1e-6
    scores = _scores(heuristic.measure(scene, 10), scene)
    expected = reference(Net())
    for n, score in scores.items():
        assert score.shape == model.get_parameter(n).shape
        torch.testing.assert_close(
            score.double(), expected[n], rtol=tolerance, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}"
        )
    if name != "s-bitfit":  # its entries are tied by design; it has a test of its own
        budget = _clear_budget(expected, 31)
        tuner = dk.SparseTuner(
            model,
            Static(budget=budget, heuristic=heuristic),
            calibration=_calibration(),
            total_steps=STEPS,
        )
        assert _chosen(tuner.delta()) == _top(expected, budget)


def test_grasp_by_differences_approaches_the_exact_product() -> None:
    scene = _scene(Net())
    exact = _scores(Grasp(num_batches=2).measure(scene, 1), scene)
    near = _scores(Grasp(num_batches=2, difference=1e-5).measure(scene, 1), scene)
    for n, score in exact.items():
        torch.testing.assert_close(near[n], score, rtol=1e-4, atol=1e-7)
    with pytest.raises(ConfigError, match="16-bit"):
        Grasp(difference=1e-2).measure(_scene(Net(torch.bfloat16)), 1)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return g * 1.0


def test_grasp_names_the_way_out_where_the_model_cannot_be_differentiated_twice() -> None:
    class Stubborn(Net):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = _Once.apply(super().forward(tokens))
            return out

    before = _weights(Stubborn())
    model = Stubborn()
    with pytest.raises(TrainingError, match="difference=1e-2"):
        Grasp().measure(_scene(model), 1)
    Grasp(difference=1e-4).measure(_scene(model), 1)
    assert all(torch.equal(before[n], w) for n, w in _weights(model).items())


# ---- dense phases


def test_lottery_tickets_of_several_iterations_follow_the_dense_loop() -> None:
    """Dense, pick a third, rewind, tune what is chosen; what was tuned keeps its values."""
    budget = 20
    reference = Net()
    base = start = _weights(reference)
    mask = {n: torch.zeros_like(w, dtype=torch.bool) for n, w in base.items()}
    for turn in (1, 2, 3):
        after = _dense(reference, STEPS, start=start)
        change = {n: (after[n] - base[n]).abs().masked_fill(mask[n], -1) for n in base}
        share = budget * turn // 3 - sum(int(m.sum()) for m in mask.values())
        for n, indices in _top(change, share).items():
            mask[n].view(-1)[list(indices)] = True
        if turn < 3:
            start = _dense(reference, STEPS, lambda n, g: g * mask[n], start=start)
    model = Net()
    method = Static(budget=budget, heuristic=LotteryTicket(**PHASE, iterations=3))
    tuner = dk.SparseTuner(model, method, calibration=_calibration(), total_steps=STEPS)
    delta = tuner.delta()
    assert _chosen(delta) == {
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
    base = _weights(reference)
    after = _dense(reference, STEPS, lambda n, g: g * (torch.rand_like(g) < 0.3) / 0.3)
    method = METHODS["child-tuning-f"](budget=40, dense_steps=STEPS, dense_lr=RATE)
    delta = dk.SparseTuner(model, method, calibration=_calibration()).delta()
    assert delta.nnz == 40
    for n, tensor in delta.tensors.items():
        expected = (after[n] - base[n]).flatten()[tensor.indices]
        torch.testing.assert_close(torch.from_numpy(tensor.values), expected, rtol=1e-6, atol=1e-12)


def test_diff_pruning_equals_gates_differentiated_by_hand() -> None:
    """The gate's derivative written out, its penalty large enough to be seen."""
    penalty, gate_lr = 3e-2, 2.0
    reference = Net()
    base = _weights(reference)
    live = dict(reference.train().named_parameters())
    names = sorted(live)
    values = {n: nn.Parameter(torch.zeros_like(base[n])) for n in names}
    logits = {n: nn.Parameter(torch.full_like(base[n], 5.0)) for n in names}
    groups: list[Any] = [
        {"params": list(values.values()), "lr": RATE},
        {"params": list(logits.values()), "lr": gate_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    batches = _calibration().batches(0)
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
        _loss(reference, next(batches)).backward()
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
    scene = _scene(model)
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
    base = {n: w.float() for n, w in _weights(reference).items()}
    live = dict(reference.train().named_parameters())
    scores = {n: nn.Parameter(torch.full_like(base[n], 1e-2)) for n in sorted(live)}
    optimizer = torch.optim.AdamW(scores.values(), lr=3e-3, weight_decay=0.0)
    batches = _calibration().batches(0)
    masked = 0
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 8)
        for n, score in scores.items():
            live[n].data.copy_(base[n] * (score.detach() >= 5e-3))
            masked += int((score.detach() < 5e-3).sum())
        reference.zero_grad()
        _loss(reference, next(batches)).backward()
        for n, score in scores.items():
            grad = live[n].grad
            score.grad = None if grad is None else grad.float() * base[n]
        optimizer.step()
    assert masked > 50
    model = Net(dtype)
    before = _weights(model)
    method = METHODS["threshold-mask"](budget=30, dense_steps=8, dense_lr=3e-3)
    measured = method.heuristic.measure(scene := _scene(model), 30)
    for target in scene.targets:
        torch.testing.assert_close(
            measured.scores(target.number), -scores[target.name].detach().flatten()
        )
    tuner = dk.SparseTuner(model, method, calibration=_calibration())
    chosen = _chosen(tuner.delta())
    assert sum(map(len, chosen.values())) == 30
    for n, weight in _weights(model).items():
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
            return _loss(net, batch)

        scene = _scene(model, ("head.weight",))
        scene = Scene(
            targets=scene.targets,
            extras=scene.extras,
            model=model,
            calibration=Batches(_data(), spy),
        )
        LotteryTicket(**PHASE).measure(scene, 5)
        assert torch.equal(seen[0], head) and not torch.equal(seen[-1], head)
        assert torch.equal(model.head.weight, head)


def test_a_dense_phase_needs_a_length_and_tells_its_progress() -> None:
    scene = _scene(Net(), total_steps=10)
    told: list[str] = []
    LotteryTicket(dense_fraction=0.5, say=told.append).measure(scene, 5)
    assert len(told) == 5 and told[-1].startswith("dense phase: step 5 of 5, loss ")
    open_ended = Scene(targets=scene.targets, model=scene.model, calibration=scene.calibration)
    with pytest.raises(ConfigError, match="dense_steps"):
        LotteryTicket().measure(open_ended, 5)
    diverging = Scene(
        targets=scene.targets,
        model=scene.model,
        calibration=Batches(_data(), lambda m, b: _loss(m, b) * torch.inf),
    )
    with pytest.raises(TrainingError, match="step 0: the loss is inf; lower dense_lr"):
        LotteryTicket(**PHASE).measure(diverging, 5)


# ---- biases


def test_true_biases_leave_norms_and_weights_out() -> None:
    tuner = dk.SparseTuner(Net(), METHODS["bitfit"](budget=11))
    assert _chosen(tuner.delta()) == {
        "head.bias": {0, 1, 2},
        "twice.bias": set(range(6)),
        "unused.bias": {0, 1},
    }
    with pytest.raises(BudgetError, match="budget 12 is more than the 11 bias entries"):
        dk.SparseTuner(Net(), METHODS["bitfit"](budget=12))


def test_scores_lie_where_their_tensor_does() -> None:
    """The meta device stands in for any other than the CPU."""
    scene = _scene(Net().to("meta"))
    for method in ("bitfit", "pafi", "super-tuning"):
        measured = METHODS[method](budget=3).heuristic.measure(scene, 3)
        assert {measured.scores(t.number).device.type for t in scene.targets} == {"meta"}


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
        supports.append({(n, i) for n, indices in _chosen(delta).items() for i in indices})
    assert all(a < b for a, b in pairwise(supports))


def test_s_bitfit_takes_whole_vectors_and_cuts_the_last() -> None:
    sums = {n: s.flatten()[0].item() for n, s in _vector_sums(Net()).items()}
    biases = {n: Net().get_parameter(n).numel() for n, s in sums.items() if s > -torch.inf}
    ranked = sorted(biases, key=lambda n: -sums[n])
    for budget in range(1, 12):
        method = METHODS["s-bitfit"](budget=budget, num_batches=2)
        delta = dk.SparseTuner(Net(), method, calibration=_calibration()).delta()
        left, expected = budget, {}
        for n in ranked:
            if taken := min(left, biases[n]):
                expected[n] = set(range(taken))
            left -= taken
        assert _chosen(delta) == expected
    with pytest.raises(BudgetError, match="12 is more than the 11 bias"):
        dk.SparseTuner(Net(), METHODS["s-bitfit"](budget=12), calibration=_calibration())


def test_u_bitfit_takes_the_best_bias_entries() -> None:
    grads, net = _summed(Net(), 2), Net()
    names = ["head.bias", "twice.bias", "unused.bias"]
    scores = {n: (-net.get_parameter(n).detach() * grads[n]).clamp(min=0) for n in names}
    method = METHODS["u-bitfit"](budget=3, num_batches=2)
    delta = dk.SparseTuner(Net(), method, calibration=_calibration()).delta()
    assert _chosen(delta) == _top(scores, 3)
    full = METHODS["u-bitfit"](budget=11)
    assert dk.SparseTuner(Net(), full, calibration=_calibration()).delta().nnz == 11


# ---- laws of every registered heuristic and method


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
        scene = _scene(model, ("twice.weight",))
        before = deepcopy(_state(model))
        budgets = 9 if name == "s-bitfit" else 30
        first = _scores(heuristic.measure(scene, budgets), scene)
        first = {n: s.clone() for n, s in first.items()}
        after = _state(model)
        assert all(torch.equal(before[0][n], t) for n, t in after[0].items())
        for (needed, grad), (needs, now) in zip(before[1], after[1], strict=True):
            assert needed == needs and (grad is None) == (now is None)
            assert grad is None or torch.equal(grad, now)
        assert before[2] == after[2] and torch.equal(before[3], after[3])
        torch.rand(3)
        again = _scores(heuristic.measure(scene, budgets), scene)
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
        before = _weights(model)
        tuner = dk.SparseTuner(
            model,
            METHODS[name](budget=budget, **(options if phased else {})),
            calibration=_calibration(),
            total_steps=STEPS,
            lr=RATE,
            extras=extras,
        )
        for batch in _data(STEPS):
            _loss(model, batch).backward()
            tuner.step()
        delta = tuner.delta()
        assert delta.nnz == budget
        chosen = _chosen(delta)
        for n, weight in _weights(model).items():
            if n in extras:
                continue
            moved = set((weight != before[n]).flatten().nonzero().flatten().tolist())
            assert moved <= chosen.get(n, set()), n


# ---- refusals


def test_bad_settings_and_missing_data_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_samples must be at least 1, found 0"):
        Fisher(num_samples=0)
    with pytest.raises(ConfigError, match="labels must be one of empirical, model, expected"):
        Fisher(labels="true")
    with pytest.raises(ConfigError, match="probability"):
        ChildTuningF(probability=0.0)
    with pytest.raises(ConfigError, match="dense_lr"):
        ThresholdMask(dense_lr=-1.0)
    with pytest.raises(ConfigError, match="iterations must be at least 1"):
        LotteryTicket(iterations=0)
    with pytest.raises(ConfigError, match="difference"):
        Grasp(difference=0.0)
    with pytest.raises(ConfigError, match="gate_lr"):
        DiffPruning(gate_lr=0.0)
    with pytest.raises(ConfigError, match="pass calibration="):
        dk.SparseTuner(Net(), METHODS["fish"](budget=3))
    with pytest.raises(DataError, match="no training example"):
        Fisher().measure(Scene(targets=[], model=Net(), calibration=Batches([], _loss)), 1)
    with pytest.raises(ConfigError, match="needs classes"):
        single = Batches(_data(), _loss, lambda m, b: m(b[0])[:, :1])
        Fisher(labels="model").measure(Scene(targets=[], model=Net(), calibration=single), 1)
    with pytest.raises(TrainingError, match=r"the gradient .* is not finite"):
        broken = Batches(_data(), lambda m, b: _loss(m, b) * torch.nan)
        scene = _scene(Net())
        Calibrated(Gradient()).measure(
            Scene(targets=scene.targets, model=scene.model, calibration=broken), 1
        )


def test_an_exact_expectation_over_places_is_that_of_joint_labels() -> None:
    """Two labels per example: the sum over places equals the sum over all pairs of labels."""
    model = Net()
    scene = _scene(model)

    def logits(net: nn.Module, batch: Any) -> torch.Tensor:
        out: torch.Tensor = net(torch.cat([batch[0], batch[0].flip(1)]))
        return out.unsqueeze(0)

    calibration = Batches([(x[:1], y[:1]) for x, y in _data(3)], _loss, logits)
    scene = Scene(targets=scene.targets, model=model, calibration=calibration)
    fisher = _scores(Fisher(labels="expected").measure(scene, 1), scene)
    reference, total = Net().eval(), {n: torch.zeros_like(s) for n, s in fisher.items()}
    for x, _ in _data(3):
        pair = torch.cat([x[:1], x[:1].flip(1)])
        shares = reference(pair).softmax(-1).detach()
        for a in range(CLASSES):
            for b in range(CLASSES):
                reference.zero_grad()
                cross_entropy(reference(pair), torch.tensor([a, b])).backward()
                for n, g in _filled(reference).items():
                    total[n] += shares[0, a] * shares[1, b] * g.square()
    for n, score in fisher.items():
        torch.testing.assert_close(score, total[n], rtol=1e-5, atol=1e-12)
    with pytest.raises(ConfigError, match="needs square=True"):
        Fisher(labels="expected", square=False).measure(scene, 1)
    wide = Batches(_data(), _loss, lambda m, b: m(b[0]).repeat(1, 400))
    with pytest.raises(ConfigError, match="1200 backward passes"):
        Fisher(labels="expected").measure(
            Scene(targets=scene.targets, model=model, calibration=wide), 1
        )
