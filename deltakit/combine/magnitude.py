"""Magnitude pruning, then the weighted sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltakit.combine.method import METHODS, Flavours
from deltakit.combine.tasks import Tasks, Vector
from deltakit.combine.trim import Trimmed
from deltakit.combine.weighted_sum import weighted_sum


@METHODS.register("magnitude", "weighted sum of each delta's largest changes", "Han et al., 2015")
@dataclass(frozen=True, kw_only=True)
class Magnitude(Trimmed):
    """tau = scale * sum_t w_t trim(tau_t), where trim keeps the changes of largest |tau_t|.

    Source: Han et al., "Learning both Weights and Connections" (2015), of changes for weights; as
    `magnitude_prune` in peft, which trims by tensor, a share of numel.
    """

    flavours: ClassVar[Flavours] = {
        "peft": {"trim_scope": "tensor", "density_of": "numel", "rounding": "float"}
    }

    def stack(self, tasks: Tasks) -> dict[str, Vector]:
        return weighted_sum(tasks, self.trimmed(tasks))
