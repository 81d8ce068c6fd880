"""Lottery-ticket sparse fine-tuning: the weights that change most in full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltakit.gradient_hooks import on_gradient
from deltakit.selection.allocation import Allocation
from deltakit.selection.dense_phase import (
    DensePhase,
    Weights,
    detached,
    initial_weights,
    trainable,
)
from deltakit.selection.gradient_passes import check_count
from deltakit.selection.heuristics import HEURISTICS, Measurement
from deltakit.selection.methods import METHODS
from deltakit.selection.ranking import rank
from deltakit.selection.scene import Calibration, Scene, measuring
from deltakit.selection.static import Static


@HEURISTICS.register("lt-sft", "weights that full fine-tuning changes most", "Ansell et al. 2022")
@dataclass(frozen=True, kw_only=True)
class LotteryTicket(DensePhase):
    """|w - w_0| after a dense phase, which is then taken back (Ansell et al. 2022, section 3.1).

    iterations: dense phases. Each adds its share of the budget, compared across all tensors; a
    sparse phase of as many steps trains the entries chosen so far before the next one, and they
    keep the values it gave them, as in the authors' code.
    """

    iterations: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("iterations", self.iterations)

    def measure(self, scene: Scene, budget: int) -> Measurement:
        """Changes in the last dense phase; entries of earlier iterations score infinity."""
        model, calibration = scene.calibrated("lt-sft")
        with measuring(scene, model, extras=True):
            base = start = initial_weights(scene)
            chosen = {n: torch.zeros_like(w, dtype=torch.bool) for n, w in base.items()}
            for turn in range(1, self.iterations + 1):
                before = [extra.detach().clone() for extra in scene.extras]
                dense = self._train(scene, model, calibration, start)
                changes = {n: (w - base[n]).abs() for n, w in dense.items()}
                if turn < self.iterations:
                    share = budget * turn // self.iterations - sum(
                        int(m.sum()) for m in chosen.values()
                    )
                    _extend(chosen, changes, scene, share)
                    _rewind(scene, before)
                    start = self._train(scene, model, calibration, start, chosen)
        scores = {n: c.masked_fill(chosen[n], torch.inf) for n, c in changes.items()}
        if self.iterations == 1:
            return Measurement(scores.__getitem__)
        tuned = {n: w - base[n] for n, w in start.items()}
        return Measurement(scores.__getitem__, lambda n, at: tuned[n][at.to(tuned[n].device)])

    def _train(
        self,
        scene: Scene,
        model: torch.nn.Module,
        calibration: Calibration,
        start: Weights,
        masks: Weights | None = None,
    ) -> Weights:
        weights = trainable(start)
        if masks is not None:
            for number, weight in weights.items():
                on_gradient(weight, masks[number].mul)
        groups = [{"params": list(weights.values())}]
        self.run(scene, model, calibration, weights.__getitem__, groups)
        return detached(weights)


def _extend(chosen: Weights, changes: Weights, scene: Scene, count: int) -> None:
    open_ = Measurement(lambda n: changes[n].masked_fill(chosen[n], -torch.inf))
    owners, indices = rank(open_, scene, count, None)
    for number in torch.unique(owners).tolist():
        chosen[number][indices[owners == number].to(chosen[number].device)] = True


@torch.no_grad()
def _rewind(scene: Scene, extras: list[torch.Tensor]) -> None:
    for parameter, before in zip(scene.extras, extras, strict=True):
        parameter.copy_(before)


@METHODS.register("lt-sft", "lottery-ticket sparse fine-tuning", "Ansell et al. 2022")
def lt_sft(
    *,
    budget: int,
    allocation: Allocation = "global",
    dense_steps: int | None = None,
    dense_fraction: float = 1.0,
    dense_lr: float = 5e-5,
    iterations: int = 1,
    seed: int = 0,
) -> Static:
    """Full fine-tuning, the entries of largest change, rewind, training of those alone."""
    heuristic = LotteryTicket(
        dense_steps=dense_steps,
        dense_fraction=dense_fraction,
        dense_lr=dense_lr,
        iterations=iterations,
        seed=seed,
    )
    return Static(budget=budget, heuristic=heuristic, allocation=allocation)
