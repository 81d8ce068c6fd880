"""Heuristics: what makes an entry worth training. Every strategy takes every heuristic.

Some score the gradient of a step (`StepScore`, as D3 does), and cost no pass of their own; others
measure the model before a selection (`Measure`), by its weights or by passes over data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from deltakit.registry import Registry
from deltakit.selection.scene import Scene


@runtime_checkable
class StepScore(Protocol):
    """A score of gradient and weight, entry by entry."""

    def score(self, gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Scores >= 0: gradient [n], weight [n] of any floating dtype -> float32 [n].

        Zero means that the entry is not worth choosing.
        """

    def least_gradient(self, score: float, smallest: float, largest: float) -> float:
        """A lower bound on |g| for entries that score at least `score` > 0.

        smallest, largest: bounds of |w| over the tensor. The bound must leave room for rounding.
        """


@dataclass(frozen=True)
class Measurement:
    """What a heuristic measured. scores: tensor number -> flat scores, float [numel]; the highest
    are chosen, negative ones too. Called once per tensor, so it may compute or free on demand.

    values: (tensor number, flat indices [n]) -> values [n] that the entries start from. frozen:
    those values are the result and are not trained.
    """

    scores: Callable[[int], torch.Tensor]
    values: Callable[[int, torch.Tensor], torch.Tensor] | None = None
    frozen: bool = False


@runtime_checkable
class Measure(Protocol):
    """A score that is measured before a selection."""

    def measure(self, scene: Scene, budget: int) -> Measurement:
        """Score all targets, leaving the model as it was found (see `scene.measuring`).

        budget: entries to be chosen, for methods whose measuring depends on it.
        """


Heuristic = StepScore | Measure
HEURISTICS: Registry[Callable[..., Any]] = Registry("heuristic")


def resolve_heuristic(heuristic: str | Heuristic) -> Heuristic:
    """The heuristic of that name with its defaults, or the object itself."""
    if isinstance(heuristic, str):
        made: Heuristic = HEURISTICS[heuristic]()
        return made
    return heuristic
