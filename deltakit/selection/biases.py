"""Bias terms: which tensors they are, and selections that stay within them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from deltakit.errors import BudgetError
from deltakit.selection.gradient_passes import widened
from deltakit.selection.heuristics import Measure, Measurement
from deltakit.selection.scene import Scene
from deltakit.targets.roles import is_bias


def bias_scene(scene: Scene, budget: int) -> Scene:
    """The scene with true bias terms as its only targets.

    True bias terms (Ben-Zaken et al. 2022) are the bias vectors of layers that are no
    normalisation; those are told by the module's type and by its name. Raises BudgetError when the
    biases hold fewer than `budget` free entries.
    """
    biases = [t for t in scene.targets if is_bias(t.live_name, len(t.shape), scene.model)]
    room = sum(t.numel - len(t.blocked()) for t in biases)
    if budget > room:
        raise BudgetError(
            f"budget {budget} is more than the {room} bias entries of the targets that can be "
            "chosen; lower it to that number"
        )
    return replace(scene, targets=biases)


def never_elsewhere(
    scene: Scene, biases: Scene, scores: Callable[[int], torch.Tensor]
) -> Callable[[int], torch.Tensor]:
    """Scores for all targets of a scene: those of its biases, and -inf for other tensors."""
    inside = {t.number for t in biases.targets}
    parameters = {t.number: t.parameter for t in scene.targets}

    def all_scores(number: int) -> torch.Tensor:
        if number in inside:
            return scores(number)
        return torch.full_like(widened(parameters[number]), -torch.inf)

    return all_scores


@dataclass(frozen=True)
class OnBiases:
    """A measure whose scores count for true bias terms only; see `bias_scene`.

    It needs the "global" allocation: others would give seats to tensors that are no biases.
    """

    heuristic: Measure

    def measure(self, scene: Scene, budget: int) -> Measurement:
        """Scores of biases, and -inf elsewhere; BudgetError for more entries than biases hold."""
        biases = bias_scene(scene, budget)
        measured = self.heuristic.measure(biases, budget)
        return replace(measured, scores=never_elsewhere(scene, biases, measured.scores))
