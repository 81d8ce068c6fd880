"""Scores measured before training against naive dense references, and their refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heuristic_lab import (
    CLASSES,
    MEASURES,
    STEPS,
    Net,
    Scores,
    chosen_entries,
    filled_gradients,
    highest,
    loss_of,
    make_calibration,
    scene_of,
    scores_of,
    token_batches,
    weights_of,
)
from torch import nn
from torch.nn.functional import cross_entropy

import deltakit as dk
from deltakit.errors import ConfigError, DataError, TrainingError
from deltakit.selection import METHODS, Static
from deltakit.selection.calibrated import Calibrated
from deltakit.selection.child_tuning_f import ChildTuningF
from deltakit.selection.diff_pruning import DiffPruning
from deltakit.selection.fisher import Fisher
from deltakit.selection.gradient import Gradient
from deltakit.selection.grasp import Grasp
from deltakit.selection.lt_sft import LotteryTicket
from deltakit.selection.scene import Scene
from deltakit.selection.threshold_mask import ThresholdMask
from deltakit.training.calibration import Batches


def _clear_budget(scores: Scores, least: int) -> int:
    """The first budget from `least` on whose last entry stands clear of the next."""
    flat = torch.cat([s.flatten() for s in scores.values()]).double().sort(descending=True).values
    gaps = flat[:-1] - flat[1:] > 1e-6 * flat[:-1].abs()
    return least + int(gaps[least - 1 :].nonzero()[0])


@pytest.mark.parametrize("name", MEASURES)
def test_measured_scores_equal_a_naive_dense_reference(name: str) -> None:
    """The model is float64, so that only rounding tells them apart; the chosen are the same."""
    heuristic, reference = MEASURES[name]
    model = Net()
    scene = scene_of(model)
    # Scores of step gradients, and shares of labels, are float32.
    tolerance = 1e-5 if "expected" in name or "model" in name else 1e-6
    scores = scores_of(heuristic.measure(scene, 10), scene)
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
            calibration=make_calibration(),
            total_steps=STEPS,
        )
        assert chosen_entries(tuner.delta()) == highest(expected, budget)


def test_grasp_by_differences_approaches_the_exact_product() -> None:
    scene = scene_of(Net())
    exact = scores_of(Grasp(num_batches=2).measure(scene, 1), scene)
    near = scores_of(Grasp(num_batches=2, difference=1e-5).measure(scene, 1), scene)
    for n, score in exact.items():
        torch.testing.assert_close(near[n], score, rtol=1e-4, atol=1e-7)
    with pytest.raises(ConfigError, match="16-bit"):
        Grasp(difference=1e-2).measure(scene_of(Net(torch.bfloat16)), 1)


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

    before = weights_of(Stubborn())
    model = Stubborn()
    with pytest.raises(TrainingError, match="difference=1e-2"):
        Grasp().measure(scene_of(model), 1)
    Grasp(difference=1e-4).measure(scene_of(model), 1)
    assert all(torch.equal(before[n], w) for n, w in weights_of(model).items())


def test_scores_lie_where_their_tensor_does() -> None:
    """The meta device stands in for any other than the CPU."""
    scene = scene_of(Net().to("meta"))
    for method in ("bitfit", "pafi", "super-tuning"):
        measured = METHODS[method](budget=3).heuristic.measure(scene, 3)
        assert {measured.scores(t.number).device.type for t in scene.targets} == {"meta"}


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
        Fisher().measure(Scene(targets=[], model=Net(), calibration=Batches([], loss_of)), 1)
    with pytest.raises(ConfigError, match="needs classes"):
        single = Batches(token_batches(), loss_of, lambda m, b: m(b[0])[:, :1])
        Fisher(labels="model").measure(Scene(targets=[], model=Net(), calibration=single), 1)
    with pytest.raises(TrainingError, match=r"the gradient .* is not finite"):
        broken = Batches(token_batches(), lambda m, b: loss_of(m, b) * torch.nan)
        scene = scene_of(Net())
        Calibrated(Gradient()).measure(
            Scene(targets=scene.targets, model=scene.model, calibration=broken), 1
        )


def test_an_exact_expectation_over_places_is_that_of_joint_labels() -> None:
    """Two labels per example: the sum over places equals the sum over all pairs of labels."""
    model = Net()
    scene = scene_of(model)

    def logits(net: nn.Module, batch: Any) -> torch.Tensor:
        out: torch.Tensor = net(torch.cat([batch[0], batch[0].flip(1)]))
        return out.unsqueeze(0)

    calibration = Batches([(x[:1], y[:1]) for x, y in token_batches(3)], loss_of, logits)
    scene = Scene(targets=scene.targets, model=model, calibration=calibration)
    fisher = scores_of(Fisher(labels="expected").measure(scene, 1), scene)
    reference, total = Net().eval(), {n: torch.zeros_like(s) for n, s in fisher.items()}
    for x, _ in token_batches(3):
        pair = torch.cat([x[:1], x[:1].flip(1)])
        shares = reference(pair).softmax(-1).detach()
        for a in range(CLASSES):
            for b in range(CLASSES):
                reference.zero_grad()
                cross_entropy(reference(pair), torch.tensor([a, b])).backward()
                for n, g in filled_gradients(reference).items():
                    total[n] += shares[0, a] * shares[1, b] * g.square()
    for n, score in fisher.items():
        torch.testing.assert_close(score, total[n], rtol=1e-5, atol=1e-12)
    with pytest.raises(ConfigError, match="needs square=True"):
        Fisher(labels="expected", square=False).measure(scene, 1)
    wide = Batches(token_batches(), loss_of, lambda m, b: m(b[0]).repeat(1, 400))
    with pytest.raises(ConfigError, match="1200 backward passes"):
        Fisher(labels="expected").measure(
            Scene(targets=scene.targets, model=model, calibration=wide), 1
        )
