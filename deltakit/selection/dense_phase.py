"""Dense phases: methods that train all targets for a while, to see which entries matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from deltakit.errors import ConfigError, TrainingError
from deltakit.selection.gradient_passes import check_count, widened
from deltakit.selection.scene import Calibration, Scene

Weights = dict[int, torch.Tensor]  # tensor number -> flat float32 [numel], float64 for float64
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class DensePhase:
    """Settings of a dense phase, shared by the methods that have one.

    dense_steps: its optimizer steps; None takes `dense_fraction` of the run's steps, which come
    after. dense_lr: of AdamW without weight decay, falling linearly to zero; targets and extras
    share it. seed: of the order of batches and all that is random. say: told about progress.
    """

    dense_steps: int | None = None
    dense_fraction: float = 1.0
    dense_lr: float = 5e-5
    seed: int = 0
    say: Say | None = None

    def __post_init__(self) -> None:
        check_count("dense_steps", self.dense_steps)
        if self.dense_fraction <= 0 or self.dense_lr <= 0:
            raise ConfigError(
                "dense_fraction and dense_lr must be above 0, found "
                f"{self.dense_fraction} and {self.dense_lr}"
            )

    def steps(self, scene: Scene) -> int:
        """Optimizer steps of the phase; ConfigError where neither they nor the run's are known."""
        if self.dense_steps is not None:
            return self.dense_steps
        if scene.total_steps is None:
            raise ConfigError("a dense phase needs dense_steps, as total_steps is not known")
        return max(1, round(self.dense_fraction * scene.total_steps))

    def run(
        self,
        scene: Scene,
        model: torch.nn.Module,
        calibration: Calibration,
        weight: Callable[[int], torch.Tensor],
        groups: Sequence[dict[str, Any]],
    ) -> None:
        """Train what the targets' weights are made of, and the extras; called inside `measuring`.

        weight: tensor number -> its weights now, flat, as a function of the tensors in `groups`,
        parameter groups of torch's AdamW. Raises TrainingError for a loss that is not finite.
        """
        steps = self.steps(scene)
        extras = [(p, widened(p).clone().requires_grad_()) for p in scene.extras]
        trained = [*groups, {"params": [master for _, master in extras]}]
        optimizer = torch.optim.AdamW(
            [g for g in trained if g["params"]], lr=self.dense_lr, weight_decay=0.0
        )
        rates = [group["lr"] for group in optimizer.param_groups]
        model.train()
        torch.manual_seed(self.seed)
        for step, batch in enumerate(islice(calibration.batches(self.seed), steps)):
            live = [(t.parameter, weight(t.number)) for t in scene.targets] + extras
            _write(live)
            loss = calibration.loss(model, batch)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"dense phase, step {step}: the loss is {loss.item()}; lower dense_lr or look "
                    "for broken inputs"
                )
            torch.autograd.backward(loss)
            for parameter, made in live:
                if parameter.grad is not None:
                    torch.autograd.backward(made, widened(parameter.grad))
                parameter.grad = None
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
            if self.say and (step + 1) * 10 // steps > step * 10 // steps:
                self.say(f"dense phase: step {step + 1} of {steps}, loss {loss.item():.4g}")
        _write([(t.parameter, weight(t.number)) for t in scene.targets] + extras)


def initial_weights(scene: Scene) -> Weights:
    """A flat copy of every target; ConfigError where one is quantised."""
    scene.refuse_codes("a dense phase writes all weights of its targets")
    return {t.number: widened(t.parameter).clone() for t in scene.targets}


def trainable(weights: Weights) -> Weights:
    """Copies that gradients reach."""
    return {number: weight.clone().requires_grad_() for number, weight in weights.items()}


def detached(weights: Weights) -> Weights:
    """The same weights, out of reach of gradients."""
    return {number: weight.detach() for number, weight in weights.items()}


@torch.no_grad()
def _write(live: Sequence[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    for parameter, made in live:
        parameter.copy_(made.view_as(parameter))
