"""Task arithmetic: adding and subtracting what deltas do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from deltakit.combine.method import METHODS, Flavours, Method
from deltakit.combine.tasks import Tasks, Vector
from deltakit.combine.weighted_sum import weighted_sum


@METHODS.register(
    "task-arithmetic", "weighted sum of changes; negative weights unlearn", "Ilharco et al., 2023"
)
@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Method):
    """tau = scale * sum_t w_t tau_t, divided by sum_t w_t with `normalize`.

    The sum of weights counts all deltas, those without the entry too; 0 counts as 1. Unlike
    `linear`, `set` entries always add up as changes.

    Source: Ilharco et al., "Editing Models with Task Arithmetic" (2023), section 2.
    """

    flavours: ClassVar[Flavours] = {"mergekit": {}, "peft": {}}

    normalize: bool = False

    def stack(self, tasks: Tasks) -> dict[str, Vector]:
        made = weighted_sum(tasks, tasks.vectors())
        if self.normalize:
            for name, vector in made.items():
                weights = np.sum([task.weights[name] for task in tasks], dtype=vector.values.dtype)
                np.divide(vector.values, weights or 1, out=vector.values)
        return made
