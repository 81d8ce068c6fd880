"""Supports that are fixed before training, and methods whose budget follows from the targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from deltakit.selection.methods import Chosen, Method, Scene, Start, refuse_marks


@runtime_checkable
class Unresolved(Protocol):
    """A method that learns its budget from the targets."""

    def resolve(self, scene: Scene) -> Method:
        """The method with its budget known; asked once, before anything changes."""


@dataclass(frozen=True, kw_only=True)
class FixedSupport:
    """A support that is known already. budget: its entries and those in training before it."""

    budget: int
    support: Sequence[Chosen]

    def start(self, scene: Scene) -> Start:
        """The support; BudgetError for budget checkpoints, which it lacks."""
        refuse_marks(scene, self.budget, "a mask")
        return Start(support=list(self.support))


def resolved(method: Method | Unresolved, scene: Scene) -> Method:
    """The method itself, or what it becomes in this scene."""
    return method.resolve(scene) if isinstance(method, Unresolved) else method
