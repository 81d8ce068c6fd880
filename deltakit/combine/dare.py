"""DARE: drop changes at random and rescale the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltakit.combine.drop import Dropped
from deltakit.combine.elect import Elected
from deltakit.combine.method import METHODS, Flavours
from deltakit.combine.tasks import Tasks, Vector
from deltakit.combine.trim import check_density
from deltakit.combine.weighted_sum import weighted_sum


@METHODS.register("dare", "weighted sum after dropping at random and rescaling", "Yu et al., 2024")
@dataclass(frozen=True, kw_only=True)
class Dare(Dropped):
    """tau = scale * sum_t w_t m_t tau_t / density, m_t ~ Bernoulli(density) per entry.

    density is 1 - p of the paper, above 0 and at most 1; draws over entries are distributed as
    draws over all elements are, so there is no question of what it is a share of. mergekit's
    "rescale" keeps the sum of magnitudes instead of dividing.

    Source: Yu et al., "Language Models are Super Mario" (2024).
    """

    flavours: ClassVar[Flavours] = {"mergekit": {"rescale": "l1"}, "peft": {}}

    density: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)

    def stack(self, tasks: Tasks) -> dict[str, Vector]:
        return weighted_sum(tasks, self.thinned(tasks))

    def thinned(self, tasks: Tasks) -> list[dict[str, Vector]]:
        """The task vectors after dropping and rescaling."""
        return [
            {
                name: self.survivors(vector, self.density, name, task.number)
                for name, vector in task.vectors().items()
            }
            for task in tasks
        ]


@METHODS.register("dare-ties", "DARE, then the election of TIES", "Yu et al., 2024")
@dataclass(frozen=True, kw_only=True)
class DareTies(Dare, Elected):
    """The election and mean of TIES over m_t tau_t / density; see `Dare` and `Ties`.

    mergekit elects after weighting and sums; peft divides by the number of those that agree.

    Source: Yu et al., "Language Models are Super Mario" (2024).
    """

    flavours: ClassVar[Flavours] = {
        "mergekit": {"rescale": "l1", "elect": "weighted", "tie": "positive", "combine": "sum"},
        "peft": {"tie": "positive", "combine": "count"},
    }

    def stack(self, tasks: Tasks) -> dict[str, Vector]:
        return self.agreed(tasks, self.thinned(tasks))
