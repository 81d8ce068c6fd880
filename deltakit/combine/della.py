"""DELLA: drop changes at random, small ones rather than large ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from deltakit.combine.drop import Dropped
from deltakit.combine.elect import Elected
from deltakit.combine.method import METHODS, Flavours
from deltakit.combine.tasks import Tasks, Vector
from deltakit.combine.weighted_sum import weighted_sum
from deltakit.dtypes import Array
from deltakit.errors import ConfigError


@METHODS.register(
    "della-linear", "weighted sum after dropping by rank of magnitude", "Deep et al., 2024"
)
@dataclass(frozen=True, kw_only=True)
class DellaLinear(Dropped):
    """tau = scale * sum_t w_t m_t tau_t / p_t, m_t ~ Bernoulli(p_t) per entry (MAGPRUNE).

    p_t grows linearly with the rank of |tau_t| in its row (along the last dimension), from
    density - epsilon to density + epsilon; alone in its row an entry has p = density. Equal
    magnitudes rank the higher, the lower their index. density_of: ranks among the row's "entries",
    or among all its elements ("numel"), where the zeros rank lowest, as in a dense computation.

    Source: Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through
    Magnitude-Based Sampling" (2024).
    """

    flavours: ClassVar[Flavours] = {"mergekit": {"rescale": "l1", "density_of": "numel"}}

    density: float = 0.2
    epsilon: float = 0.15
    density_of: Literal["entries", "numel"] = "entries"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.density - self.epsilon <= self.density + self.epsilon <= 1:
            raise ConfigError(
                f"density {self.density} with epsilon {self.epsilon}: epsilon is at least 0, and "
                "density - epsilon and density + epsilon are within 0..1"
            )

    def stack(self, tasks: Tasks) -> dict[str, Vector]:
        return weighted_sum(tasks, self.thinned(tasks))

    def thinned(self, tasks: Tasks) -> list[dict[str, Vector]]:
        """The task vectors after dropping and rescaling."""
        return [
            {
                name: self.survivors(v, self._chances(v, tasks.shape(name)), name, task.number)
                for name, v in task.vectors().items()
            }
            for task in tasks
        ]

    def _chances(self, vector: Vector, shape: tuple[int, ...]) -> Array:
        """The probability [n] with which each change stays, float64."""
        width = shape[-1] if shape else 1
        ranks, held = row_ranks(vector, max(width, 1))
        of = held if self.density_of == "entries" else np.full_like(held, width)
        ranks += of - held
        relative = np.divide(ranks, of - 1, out=np.full(len(ranks), 0.5), where=of > 1)
        return np.asarray(self.density - self.epsilon + relative * (2 * self.epsilon))


@METHODS.register("della", "DELLA's dropping, then the election of TIES", "Deep et al., 2024")
@dataclass(frozen=True, kw_only=True)
class Della(DellaLinear, Elected):
    """Drop by rank, elect signs and merge what agrees; see `DellaLinear` and `Ties`.

    mergekit elects after weighting, and takes the mean.

    Source: Deep et al., "DELLA-Merging" (2024).
    """

    flavours: ClassVar[Flavours] = {
        "mergekit": {
            "rescale": "l1",
            "density_of": "numel",
            "elect": "weighted",
            "tie": "positive",
        }
    }

    def stack(self, tasks: Tasks) -> dict[str, Vector]:
        return self.agreed(tasks, self.thinned(tasks))


def row_ranks(vector: Vector, width: int) -> tuple[Array, Array]:
    """For each change its rank in its row by magnitude, from 0, and how many the row holds,
    both int64 [n]."""
    rows = vector.indices // width
    order = np.lexsort((-vector.indices, np.abs(vector.values), rows))
    starts = np.flatnonzero(np.diff(rows, prepend=-1))  # sorting by rows leaves them in place
    held = np.diff(starts, append=len(rows))
    ranks = np.empty(len(rows), np.int64)
    ranks[order] = np.arange(len(rows)) - np.repeat(starts, held)
    return ranks, np.repeat(held, held)
