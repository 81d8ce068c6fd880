"""What a selective method is: a recipe, and what it gives the training engine to start with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from deltakit.dtypes import Array
from deltakit.errors import BudgetError, ConfigError
from deltakit.parallel.ranks import Ranks
from deltakit.registry import Registry
from deltakit.selection.scene import Candidate, Scene

METHODS: Registry[Callable[..., Any]] = Registry("method")

Joining = tuple[int, torch.Tensor, torch.Tensor]  # tensor number, flat indices, their gradients


@dataclass(frozen=True)
class Chosen:
    """A support known before training: flat indices int64 [n] of one candidate, sorted.

    seed: set when `deltakit.formats.seeded` regenerates exactly these indices from it. values:
    what the entries start from, float [n]; zeros by default.
    """

    number: int
    indices: Array
    seed: int | None = None
    values: torch.Tensor | None = None


@dataclass(frozen=True)
class Change:
    """How a support changes: entries that leave and entries that join, per tensor number."""

    leaving: Sequence[tuple[int, torch.Tensor]] = ()
    joining: Sequence[Joining] = ()


class Support(Protocol):
    """The entries in training, as a selector may ask for them; indices int64, not sorted."""

    def indices(self, number: int) -> torch.Tensor:
        """Flat indices of one tensor's entries, int64 [n]."""

    def values(self, number: int) -> torch.Tensor:
        """Their values, in the same order, [n]."""

    def blocked(self, number: int) -> Array:
        """Flat indices that are taken or must not be chosen, int64, sorted."""

    def forbidden(self, number: int) -> Array:
        """Flat indices that must not be chosen, int64, sorted; those taken may be."""


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a tensor that this process chooses from, where several share it by rows.

    numel: its elements. is_row: whether the whole tensor is a single row (a vector).
    """

    numel: int
    is_row: bool


class Selector:
    """Chooses entries while training runs; by default it never does.

    A selector either scores the gradients of some steps (`scores_step`), in which case the engine
    calls `begin`, `offer` for each tensor that has a gradient, in any order, and `choose`; or it
    needs no gradient of a step and answers `ahead`, asked before every step's backward.

    competes: whether entries in training are scored again; if not, their gradients come as zero.
    restores: whether leaving entries get their base bits back; if not they rest where they are.
    """

    competes = False
    restores = True

    def split(self, ranks: Ranks, parts: Sequence[Part]) -> None:
        """Choose together with other processes, each from its own part of every tensor.

        What is offered and chosen is then of those parts. Raises ConfigError where that cannot be.
        """
        raise ConfigError(
            "this method moves entries between processes and does not train sharded models; use "
            "ID3, increment, static or a mask, or data-parallel training without fully_shard"
        )

    def scores_step(self, step: int) -> bool:
        """Whether the gradients of this step are scored."""
        return False

    def begin(self, step: int, support: Support) -> None:
        """A step whose gradients are scored begins."""

    def offer(
        self,
        tensor: int,
        gradient: torch.Tensor,
        weight: torch.Tensor,
        bounds: tuple[float, float],
        where: str,
    ) -> None:
        """Score a tensor's dense gradient [R, C]; weight: flat; bounds: least and largest |w|."""

    def magnitude(self, gradient: torch.Tensor) -> torch.Tensor:
        """What decides which entries of a gradient [R, C] several processes exchange; flat float32."""
        return gradient.reshape(-1).abs().float()

    def choose(self, support: Support) -> Change:
        """What joins and leaves, now that every tensor was offered."""
        return Change()

    def ahead(self, step: int, support: Support) -> Change | None:
        """What joins and leaves before the step, without its gradients; None for no change."""
        return None


@dataclass(frozen=True)
class Start:
    """How a run begins: a fixed support, and a selector where entries join during training.

    frozen: the support's values are the result and are not trained (masks that zero weights).
    """

    support: list[Chosen] = field(default_factory=list)
    selector: Selector | None = None
    frozen: bool = False


class Method(Protocol):
    """A recipe for choosing `budget` entries."""

    @property
    def budget(self) -> int:
        """Entries in all, those of a delta that training continues from included."""

    def start(self, scene: Scene) -> Start:
        """Begin a run; raises BudgetError or ConfigError before anything changes."""


def check_budget(budget: int) -> None:
    """Raise BudgetError for a budget below one."""
    if budget < 1:
        raise BudgetError(f"budget must be at least 1, found {budget}")


def refuse_marks(scene: Scene, budget: int, what: str) -> None:
    """Raise BudgetError for budget checkpoints below the budget, which `what` does not have."""
    if [m for m in scene.marks if m < budget]:
        raise BudgetError(
            f"{what} is fixed from the start and has no budget checkpoints; truncate "
            "the trained delta instead"
        )


__all__ = [
    "METHODS",
    "Candidate",
    "Change",
    "Chosen",
    "Joining",
    "Method",
    "Part",
    "Scene",
    "Selector",
    "Start",
    "Support",
    "check_budget",
    "refuse_marks",
]
