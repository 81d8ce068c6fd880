"""Model breadcrumbs: leave out both the smallest changes and the outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from deltakit.combine.elect import Elected
from deltakit.combine.method import METHODS, Flavours
from deltakit.combine.tasks import Task, Tasks, Vector
from deltakit.combine.trim import Dense, kept, share
from deltakit.combine.weighted_sum import weighted_sum
from deltakit.errors import ConfigError
from deltakit.truncation import top

_NUMEL = {"density_of": "numel", "rounding": "float"}


@METHODS.register(
    "breadcrumbs",
    "weighted sum without each tensor's smallest and largest changes",
    "Davari & Belilovsky, 2024",
)
@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(Dense):
    """tau = scale * sum_t w_t m_t tau_t; of n, m_t leaves out the floor(gamma n) largest changes
    of each tensor and keeps the floor(density n) that come next.

    gamma gives way where the two exceed n. With density_of="numel" the zeros are the smallest of n
    elements, as in a dense computation.

    Source: Davari & Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse
    Masks" (2024; gamma here is 1 - gamma there; beta is 1 - density - gamma).
    """

    flavours: ClassVar[Flavours] = {"mergekit": _NUMEL}

    gamma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma < 1:
            raise ConfigError(f"gamma {self.gamma} is not at least 0 and below 1")

    def stack(self, tasks: Tasks) -> dict[str, Vector]:
        return weighted_sum(tasks, self.middle(tasks))

    def middle(self, tasks: Tasks) -> list[dict[str, Vector]]:
        """The task vectors without their smallest changes and without outliers."""
        return [
            {name: self._middle(task, name, vector) for name, vector in task.vectors().items()}
            for task in tasks
        ]

    def _middle(self, task: Task, name: str, vector: Vector) -> Vector:
        entries = self.density_of == "entries"
        whole = len(vector.indices) if entries else task.tensors[name].numel
        inner = self.count(whole)
        outer = min(share(self.gamma, whole, self.rounding), whole - inner)
        sizes = np.abs(vector.values)
        return kept(vector, top(sizes, outer + inner) & ~top(sizes, outer))


@METHODS.register(
    "breadcrumbs-ties", "breadcrumbs, then the election of TIES", "Davari & Belilovsky, 2024"
)
@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTies(Breadcrumbs, Elected):
    """Leave out both ends, elect signs and merge what agrees; see `Breadcrumbs` and `Ties`.

    A combination of mergekit's, which elects after weighting and sums.
    """

    flavours: ClassVar[Flavours] = {
        "mergekit": {**_NUMEL, "elect": "weighted", "tie": "positive", "combine": "sum"},
    }

    def stack(self, tasks: Tasks) -> dict[str, Vector]:
        return self.agreed(tasks, self.middle(tasks))
