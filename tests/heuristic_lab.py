"""A tiny model with its data, and measured heuristics beside naive dense references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import deltakit as dk
from deltakit.selection.calibrated import Calibrated
from deltakit.selection.child_tuning_f import ChildTuningF
from deltakit.selection.fisher import Fisher
from deltakit.selection.gradient import Gradient
from deltakit.selection.grasp import Grasp
from deltakit.selection.heuristics import Measure, Measurement
from deltakit.selection.lt_sft import LotteryTicket
from deltakit.selection.magnitude import LargestMagnitude, SmallestMagnitude
from deltakit.selection.s_bitfit import SBitFit
from deltakit.selection.scene import Scene
from deltakit.selection.snip import Snip
from deltakit.selection.u_bitfit import UBitFit
from deltakit.training.calibration import Batches
from deltakit.training.target import Target

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


def token_batches(count: int = 4, size: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of random tokens and labels, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(0, 20, (size, 4), generator=generator),
            torch.randint(0, CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    """Cross entropy in float64, whatever the model's dtype."""
    return cross_entropy(model(batch[0]).double(), batch[1])


def make_calibration(count: int = 4) -> Batches:
    return Batches(token_batches(count), loss_of, lambda model, batch: model(batch[0]))


def scene_of(model: nn.Module, extras: tuple[str, ...] = (), total_steps: int = STEPS) -> Scene:
    """What a heuristic measures: every parameter a target, except the extras."""
    live = dict(model.named_parameters())
    names = sorted(set(live) - set(extras))
    return Scene(
        targets=[Target(i, name, name, live[name]) for i, name in enumerate(names)],
        total_steps=total_steps,
        extras=[live[name] for name in extras],
        model=model,
        calibration=make_calibration(),
    )


def scores_of(measurement: Measurement, scene: Scene) -> Scores:
    """The measured scores of every target, in its shape."""
    return {t.name: measurement.scores(t.number).view(t.shape) for t in scene.targets}


def gradients_of(model: nn.Module, batch: Any) -> Scores:
    """Of one batch, in eval mode; zeros where no gradient reaches."""
    model.zero_grad()
    loss_of(model.eval(), batch).backward()
    return filled_gradients(model)


def filled_gradients(model: nn.Module) -> Scores:
    """The gradients that parameters hold; zeros where there is none."""
    zero = torch.zeros_like
    return {n: zero(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def summed_gradients(model: nn.Module, count: int, seed: int = 0) -> Scores:
    """Summed over the first batches of the calibration's pass."""
    batches = make_calibration().batches(seed)
    parts = [gradients_of(model, next(batches)) for _ in range(count)]
    return {n: torch.stack([part[n] for part in parts]).sum(0) for n in parts[0]}


def weights_of(model: nn.Module) -> Scores:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def highest(scores: Scores, k: int) -> dict[str, set[int]]:
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


def chosen_entries(delta: dk.SparseDelta) -> dict[str, set[int]]:
    """Flat indices of a delta's entries by tensor."""
    return {name: set(tensor.indices.tolist()) for name, tensor in delta.tensors.items()}


def _per_example(model: nn.Module, count: int, power: Callable[[torch.Tensor], Any]) -> Scores:
    rows = [(x[i : i + 1], y[i : i + 1]) for x, y in token_batches() for i in range(len(x))][:count]
    parts = [gradients_of(model, row) for row in rows]
    return {n: sum(power(part[n]) for part in parts) for n in parts[0]}


def _expected_fisher(model: nn.Module, square: bool) -> Scores:
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    rows = [x[i : i + 1] for x, _ in token_batches() for i in range(len(x))]
    for x in rows[:7]:
        shares = model.eval()(x).softmax(-1)[0].detach()
        for label in range(CLASSES):
            grads = gradients_of(model, (x, torch.tensor([label])))
            for n, g in grads.items():
                total[n] += shares[label] * (g.square() if square else g.abs())
    return total


def _drawn_fisher(model: nn.Module) -> Scores:
    rows = [x[i : i + 1] for x, _ in token_batches() for i in range(len(x))][:7]
    with torch.no_grad():
        shares = [model.eval()(x).float().softmax(-1) for x in rows]
    torch.manual_seed(4)
    labels = [torch.multinomial(share, 1)[0] for share in shares]
    parts = [gradients_of(model, row) for row in zip(rows, labels, strict=True)]
    return {n: sum(p[n].square() for p in parts) for n in parts[0]}


def _hessian_scores(model: nn.Module) -> Scores:
    """w * (H g) with the full Hessian of the mean loss over two batches."""
    model.eval()
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    batches = make_calibration().batches(0)
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


def train_dense(
    model: nn.Module, steps: int, change: Any = None, start: Scores | None = None
) -> Scores:
    """Plain AdamW over everything, its rate falling linearly; the weights afterwards."""
    live = dict(model.train().named_parameters())
    if start is not None:
        with torch.no_grad():
            for n, p in live.items():
                p.copy_(start[n])
    optimizer = torch.optim.AdamW([live[n] for n in sorted(live)], lr=RATE, weight_decay=0.0)
    batches = make_calibration().batches(0)
    torch.manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        optimizer.zero_grad()
        loss_of(model, next(batches)).backward()
        for n in sorted(live):
            if change is not None and live[n].grad is not None:
                live[n].grad = change(n, live[n].grad)
        optimizer.step()
    return weights_of(model)


def _moved(model: nn.Module) -> Scores:
    before = weights_of(model)
    after = train_dense(model, STEPS)
    return {n: (after[n] - before[n]).abs() for n in before}


def _random_children(model: nn.Module) -> Scores:
    before = weights_of(model)
    after = train_dense(model, STEPS, lambda n, g: g * (torch.rand_like(g) < 0.4) / 0.4)
    return {n: (after[n] - before[n]).abs() for n in before}


def vector_sums(model: nn.Module) -> Scores:
    """-w * g summed over each bias vector, and -inf elsewhere."""
    biases = {"head.bias", "twice.bias", "unused.bias"}
    grads, weights = summed_gradients(model, 2), weights_of(model)
    return {
        n: torch.full_like(w, (-w * grads[n]).sum().item() if n in biases else -torch.inf)
        for n, w in weights.items()
    }


PHASE: dict[str, Any] = {"dense_steps": STEPS, "dense_lr": RATE}
MEASURES: dict[str, tuple[Measure, Callable[[Net], Scores]]] = {
    "magnitude-smallest": (
        SmallestMagnitude(),
        lambda m: {n: -w.abs() for n, w in weights_of(m).items()},
    ),
    "magnitude-largest": (
        LargestMagnitude(),
        lambda m: {n: w.abs() for n, w in weights_of(m).items()},
    ),
    "gradient over batches": (
        Calibrated(Gradient(), 3),
        lambda m: {n: g.abs() for n, g in summed_gradients(m, 3).items()},
    ),
    "snip over batches": (
        Calibrated(Snip(), 6, seed=2),  # more batches than there are: a second pass
        lambda m: {
            n: (g * m.get_parameter(n).detach()).abs() for n, g in summed_gradients(m, 6, 2).items()
        },
    ),
    "u-bitfit over batches": (
        Calibrated(UBitFit(), 2),
        lambda m: {
            n: (-g * m.get_parameter(n).detach()).clamp(min=0)
            for n, g in summed_gradients(m, 2).items()
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
    "s-bitfit": (SBitFit(num_batches=2), vector_sums),
    "lt-sft": (LotteryTicket(**PHASE), _moved),
    "child-tuning-f": (ChildTuningF(**PHASE, probability=0.4), _random_children),
    "child-tuning-f of all": (ChildTuningF(**PHASE, probability=1.0), _moved),
}
