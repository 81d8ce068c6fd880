"""The sweep for the learning rate: finds the bottom, leaves no trace, and is what a run repeats."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import nn

import deltakit as dk
from deltakit.cli.main import main
from deltakit.errors import ConfigError, TrainingError
from deltakit.selection.methods import Method
from deltakit.training.calibration import Batches
from deltakit.training.config_file import read_file, resolve
from deltakit.training.folder import RunFolder
from deltakit.training.lr_auto import compressed
from deltakit.training.lr_run import known_rate
from deltakit.training.lr_search import LrSearch, choose, walk
from deltakit.training.lr_trial import Trial, run_trial

METHODS: list[Callable[[int | None], Method]] = [
    lambda steps: dk.RandomMask(budget=60),
    lambda steps: dk.ID3(budget=60, steps=steps),
    lambda steps: dk.Repeat(budget=60, every=2, steps=steps, restore=False),
]
Batch = tuple[torch.Tensor, torch.Tensor]


class Net(nn.Module):
    """Dropout draws random numbers, BatchNorm keeps buffers: all that a trial could leave."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 12), nn.BatchNorm1d(12)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(12, 3)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(torch.tanh(self.norm(self.first(x.to(self.first.weight.dtype)))))
        logits: torch.Tensor = self.head(hidden)
        return logits.float()


def _net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(dtype)


def _loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _batches(count: int = 40) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(16, 6, generator=generator) for _ in range(count)]
    return [(x, x[:, :3].argmax(1)) for x in xs]


def _tuner(
    model: nn.Module, method: Method, rate: float, steps: int, **more: int
) -> dk.SparseTuner:
    return dk.SparseTuner(
        model, method, lr=rate, extras="head", extras_lr=1e-2, total_steps=steps, **more
    )


def _find(model: nn.Module, method: Method, total: int = 24, **options: Any) -> LrSearch:
    return dk.find_lr(
        lambda rate, steps: _tuner(model, method, rate, steps),
        Batches(_batches(), _loss),
        total_steps=total,
        **options,
    )


@pytest.mark.parametrize("center", [1e-6, 3e-4, 0.1])
@pytest.mark.parametrize("power", [-6.9, -5.3, -4.0, -2.62, -1.1, 0.3])
@pytest.mark.parametrize("stable", [0.2, 1.0, math.inf])
def test_the_walk_finds_the_bottom(center: float, power: float, stable: float) -> None:
    """Of any bowl in the logarithm, wherever it starts and however soon rates above diverge."""
    visited: dict[float, float] = {}

    def loss_at(rate: float) -> float:
        assert rate not in visited, "a rate is measured twice"
        above = math.log10(rate) - power
        visited[rate] = math.inf if above > stable else above**2
        return visited[rate]

    walk(center, loss_at)
    best = min(visited, key=lambda rate: visited[rate])
    assert abs(math.log10(best) - power) <= 1 / 8 + 1e-9 or 10**power > 10
    assert len(visited) <= 9 + abs(math.log10(center) - power)


def test_the_walk_comes_back_from_divergence_at_the_center() -> None:
    visited = []

    def loss_at(rate: float) -> float:
        visited.append(rate)
        return math.inf if rate > 1e-5 else abs(math.log10(rate) + 6)

    walk(0.1, loss_at)
    assert min(visited, key=lambda r: abs(math.log10(r) + 6)) == pytest.approx(1e-6)


def test_the_choice_is_the_smallest_rate_that_is_as_good_within_noise() -> None:
    def trial(rate: float, *held_out: float) -> Trial:
        return Trial(rate, (1.0,), held_out)

    clearly = [trial(1e-3, 2.0, 2.1), trial(1e-2, 1.0, 1.1), trial(1e-1, 1.5, 1.6)]
    assert [t.rate for t in choose(clearly)] == [1e-2, 1e-2]
    # Batches differ much, but 1e-3 loses on each by the same: no noise, so it is not as good.
    paired = [trial(1e-3, 1.01, 9.01), trial(1e-2, 1.0, 9.0)]
    assert [t.rate for t in choose(paired)] == [1e-2, 1e-2]
    noisy = [trial(1e-3, 1.3, 0.9), trial(1e-2, 1.0, 1.0), Trial(1e-1, (1.0,), ())]
    assert [t.rate for t in choose(noisy)] == [1e-2, 1e-3]
    with pytest.raises(TrainingError, match=r"diverged at every rate from 1\.0e-01 to 1\.0e-01"):
        choose([Trial(1e-1, (1.0,), ())])


def _states(model: nn.Module) -> list[Any]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    numbers = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    return [tensors, flags, modes, numbers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", METHODS)
def test_no_trace_is_left(make: Callable[[int | None], Method], dtype: torch.dtype) -> None:
    """Weights, buffers, flags, modes and random numbers, bit for bit; also where rates diverge."""
    model = _net(dtype)
    model.drop.eval()
    before = _states(model)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    search = _find(model, make(12))
    after = _states(model)
    for name, tensor in after[0].items():
        assert torch.equal(tensor, before[0][name]), name
    assert after[1:] == before[1:]
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert [t.rate for t in search.trials] == sorted(t.rate for t in search.trials)
    assert sum(len(indices) for indices in search.support.values()) >= 60


@pytest.mark.parametrize("make", METHODS)
def test_a_trial_is_a_short_run_from_the_start(make: Callable[[int | None], Method]) -> None:
    """Whatever was tried before it: the same losses as a copy of the model trained by hand."""
    model = _net()
    untouched = deepcopy(model)
    batches, steps, rate = _batches(), 10, 0.05
    plan, held_out = [batches[2 * n : 2 * n + 2] for n in range(steps)], batches[-3:]

    def make_tuner(rate: float, steps: int) -> dk.SparseTuner:
        return _tuner(model, make(5), rate, steps, accumulation_steps=2)

    run_trial(make_tuner, 10.0, plan, held_out, _loss, seed=3)
    trial, support = run_trial(make_tuner, rate, plan, held_out, _loss, seed=3)
    tuner = _tuner(untouched, make(5), rate, steps, accumulation_steps=2)
    torch.manual_seed(3)
    losses = []
    for number, pair in enumerate(plan):
        for group, whole in zip(tuner.optimizer.param_groups, (rate, 1e-2), strict=True):
            group["lr"] = whole * (1 - number / steps)
        parts = [_loss(untouched, batch) / 2 for batch in pair]
        for part in parts:
            part.backward()
        losses.append(sum(part.item() for part in parts))
        tuner.step()
    untouched.eval()
    with torch.no_grad():
        assert trial.held_out == tuple(_loss(untouched, batch).item() for batch in held_out)
    assert trial.losses == tuple(losses)
    for target in tuner.engine.entries.targets:
        if len(target.indices):
            assert torch.equal(support[target.live_name], target.indices)


@pytest.mark.parametrize("factor", [10.0, math.inf])
def test_divergence_ends_a_trial(factor: float) -> None:
    model = _net()

    calls = []

    def explode(model: nn.Module, batch: Batch) -> torch.Tensor:
        calls.append(batch)
        return _loss(model, batch) * (1.0 if len(calls) < 3 else factor)

    trial, _ = run_trial(
        lambda rate, steps: _tuner(model, dk.RandomMask(budget=9), rate, steps),
        1e-2,
        [[batch] for batch in _batches(5)],
        _batches(2),
        explode,
        seed=0,
    )
    assert trial.held_out == () and trial.loss == math.inf and len(trial.losses) == 2


def test_the_rate_is_the_measured_one_for_the_length_of_the_run() -> None:
    """A run no longer than a trial takes the trial's own rate; the reason tells the arithmetic."""
    short = _find(_net(), dk.RandomMask(budget=60), total=24)
    assert short.steps == short.total_steps == 24
    chosen = choose(short.trials)[1].rate
    assert short.rate == pytest.approx(chosen, rel=1e-2)
    longer = _find(_net(), dk.RandomMask(budget=60), total=96, steps=24)
    assert longer.trials == short.trials
    assert longer.rate == pytest.approx(chosen / 2, rel=1e-2)
    assert f"= {chosen:.2e} x sqrt(24/96 steps)" in longer.reason
    with pytest.raises(ConfigError, match="at least 1, found 0"):
        dk.find_lr(lambda rate, steps: None, None, total_steps=0)  # type: ignore


def test_methods_shrink_with_the_trial() -> None:
    assert compressed(dk.ID3(budget=9, steps=100), 0.1) == dk.ID3(budget=9, steps=10)
    assert compressed(dk.ID3(budget=9), 0.1) == dk.ID3(budget=9)
    assert compressed(dk.RandomMask(budget=9), 0.1) == dk.RandomMask(budget=9)
    listed = dk.ID3(budget=2, steps=2, schedule=[1, 1])
    assert compressed(listed, 0.1) is listed
    assert compressed(dk.Repeat(budget=9, every=20), 0.1) == dk.Repeat(budget=9, every=2)


def _flags(bert: Path, data: Path, run: Path, *more: str) -> list[str]:
    flags = ["--model", str(bert), "--data", str(data), "--task", "sequence-classification"]
    flags += ["--budget", "300", "--max-steps", "6", "--lr", "auto", "--threads", "1"]
    return [*flags, "--output-dir", str(run), *more]


@pytest.fixture(scope="module")
def run(bert: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose rate was found, with an optimizer of torch."""
    folder = tmp_path_factory.mktemp("out") / "run"
    more = ("--optimizer", "rmsprop", "--optimizer-options", "momentum=0.5")
    result = CliRunner().invoke(main, ["train", *_flags(bert, colours, folder, *more)])
    assert result.exit_code == 0, result.output
    assert "lr auto: " in result.stderr and "held-out loss" in result.stderr
    return folder


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    for name in ("lr.json", "metrics.json"):
        yield json.loads((folder / name).read_text())


def test_a_run_records_the_rate_and_where_it_came_from(run: Path) -> None:
    found, metrics = _records(run)
    assert (run / "lr.png").read_bytes().startswith(b"\x89PNG")
    assert metrics["lr"] == found["rate"] and metrics["lr_auto"] == found["reason"]
    provenance = dk.load(run / "delta.sdelta").provenance
    assert provenance["lr"] == found["rate"] and provenance["lr_auto"] == found["reason"]
    assert provenance["optimizer"] == "rmsprop"
    text = (run / "config.yaml").read_text()
    assert f"lr: {found['rate']}  # found by auto, see lr.json\n" in text
    assert yaml.safe_load(text)["optimizer_options"] == ["momentum=0.5"]


def test_a_resumed_run_keeps_the_rate_that_was_found(run: Path) -> None:
    """Asked for auto again it sweeps no more, and its saved settings agree."""
    saved = resolve(read_file(run / "config.yaml"), {})
    asked = resolve(read_file(run / "config.yaml"), {"lr": "auto"})
    assert asked.lr == "auto"
    assert known_rate(asked, RunFolder(run)) == saved == known_rate(saved, RunFolder(run))


def test_the_saved_settings_repeat_the_run_without_a_sweep(run: Path, tmp_path: Path) -> None:
    """To the same bits, so the sweep left neither model nor data order nor head different."""
    again = tmp_path / "again"
    flags = [str(run / "config.yaml"), "--output-dir", str(again)]
    result = CliRunner().invoke(main, ["train", *flags])
    assert result.exit_code == 0, result.output
    assert not (again / "lr.json").exists()
    first, second = dk.load(run / "delta.sdelta"), dk.load(again / "delta.sdelta")
    assert first.nnz == 300 and list(first.tensors) == list(second.tensors)
    for name, tensor in first.tensors.items():
        np.testing.assert_array_equal(tensor.indices, second.tensors[name].indices)
        np.testing.assert_array_equal(tensor.values, second.tensors[name].values)
    for name, extra in first.extras.items():
        np.testing.assert_array_equal(extra, second.extras[name])


def test_lr_find_reports_what_train_would_take(
    run: Path, bert: Path, colours: Path, tmp_path: Path
) -> None:
    more = ("--optimizer", "rmsprop", "--optimizer-options", "momentum=0.5")
    folder = tmp_path / "sweep"
    flags = _flags(bert, colours, folder, *more)
    result = CliRunner().invoke(main, ["lr-find", *flags, "--json"])
    assert result.exit_code == 0, result.output
    told, (kept, _) = json.loads(result.stdout), _records(run)
    assert {name: told[name] for name in kept} == kept
    assert told["two_over_lambda_max"] == pytest.approx(2 / told["lambda_max"])
    assert sorted(path.name for path in folder.iterdir()) == ["lr.json", "lr.png"]
    result = CliRunner().invoke(main, ["lr-find", *flags])
    assert (
        result.exit_code == 1 and "holds lr.json; give another folder, or --force" in result.stderr
    )
    result = CliRunner().invoke(main, ["lr-find", *flags, "--force"])
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["rate", "training", "loss", "held-out", "loss"]
    assert len(lines) == len(told["trials"]) + 3 and kept["reason"] in lines[-1]
    result = CliRunner().invoke(main, ["lr-find", *_flags(bert, colours, run)])
    assert result.exit_code == 1 and "holds an earlier run" in result.stderr
