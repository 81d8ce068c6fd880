"""Magnitudes of the pretrained weights: selection without data."""

from __future__ import annotations

from dataclasses import dataclass

from deltakit.selection.allocation import Allocation
from deltakit.selection.gradient_passes import widened
from deltakit.selection.heuristics import HEURISTICS, Measurement
from deltakit.selection.methods import METHODS
from deltakit.selection.scene import Scene
from deltakit.selection.static import Static


@HEURISTICS.register("magnitude-smallest", "small weights", "PaFi, Liao et al. 2023")
@dataclass(frozen=True, slots=True)
class SmallestMagnitude:
    """-|w|: the weights that matter least to the base are free to move (Liao et al. 2023)."""

    def measure(self, scene: Scene, budget: int) -> Measurement:
        """Scores from the live weights alone."""
        targets = {t.number: t for t in scene.targets}
        return Measurement(lambda number: -widened(targets[number].weights()).abs())


@HEURISTICS.register("magnitude-largest", "large weights", "Super-Tuning, 2026")
@dataclass(frozen=True, slots=True)
class LargestMagnitude:
    """|w|: the weights that matter most to the base (Super-Tuning, arXiv 2607.09287)."""

    def measure(self, scene: Scene, budget: int) -> Measurement:
        """Scores from the live weights alone."""
        targets = {t.number: t for t in scene.targets}
        return Measurement(lambda number: widened(targets[number].weights()).abs())


@METHODS.register("pafi", "the smallest weights of all", "PaFi, Liao et al. 2023")
def pafi(*, budget: int, allocation: Allocation = "global") -> Static:
    """The weights of smallest magnitude, one mask for every task (Liao et al. 2023, section 3.2)."""
    return Static(budget=budget, heuristic=SmallestMagnitude(), allocation=allocation)


@METHODS.register("super-tuning", "the largest weights of each tensor", "Super-Tuning, 2026")
def super_tuning(*, budget: int, allocation: Allocation = "proportional") -> Static:
    """The weights of largest magnitude of every tensor, in proportion to size (arXiv 2607.09287)."""
    return Static(budget=budget, heuristic=LargestMagnitude(), allocation=allocation)
