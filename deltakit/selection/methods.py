"""What a selective method is: a recipe, and what it gives the training engine to start with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from deltakit.dtypes import Array
from deltakit.errors import BudgetError
from deltakit.registry import Registry

if TYPE_CHECKING:
    from deltakit.selection.unmask import Unmasking

METHODS: Registry[type[Any]] = Registry("method")


class Candidate(Protocol):
    """A tensor that entries may be chosen from."""

    @property
    def name(self) -> str:
        """Its name in checkpoint coordinates."""

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""

    def blocked(self) -> Array:
        """Flat indices that are taken or must not be chosen, int64, sorted."""


@dataclass(frozen=True)
class Chosen:
    """A support known before training: flat indices int64 [n] of one candidate.

    seed: set when `deltakit.formats.seeded` regenerates exactly these indices from it.
    """

    number: int
    indices: Array
    seed: int | None = None


@dataclass(frozen=True)
class Start:
    """How a run begins: a fixed support, and a selector where entries join during training."""

    support: list[Chosen] = field(default_factory=list)
    selector: Unmasking | None = None


class Method(Protocol):
    """A recipe for choosing `budget` entries."""

    @property
    def budget(self) -> int:
        """Entries in all, those of a delta that training continues from included."""

    def start(
        self,
        candidates: Sequence[Candidate],
        *,
        taken: int,
        total_steps: int | None,
        marks: Sequence[int],
    ) -> Start:
        """Begin a run. taken: entries in training already. marks: budget checkpoints."""


def check_budget(budget: int) -> None:
    """Raise BudgetError for a budget below one."""
    if budget < 1:
        raise BudgetError(f"budget must be at least 1, found {budget}")


def check_room(budget: int, taken: int, room: int) -> int:
    """Entries left to choose; BudgetError when the tensors cannot hold them."""
    left = budget - taken
    if left < 0 or left > room:
        raise BudgetError(
            f"budget {budget} cannot be met: {taken} entries are taken already and {room} more "
            "can be chosen from the targets"
        )
    return left
