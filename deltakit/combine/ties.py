"""TIES: trim, elect signs, and merge what agrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltakit.combine.elect import MERGEKIT, PEFT, Elected
from deltakit.combine.method import METHODS, Flavours
from deltakit.combine.tasks import Tasks, Vector
from deltakit.combine.trim import Trimmed


@METHODS.register(
    "ties", "trim, elect a sign per entry, mean of those that agree", "Yadav et al., 2023"
)
@dataclass(frozen=True, kw_only=True)
class Ties(Trimmed, Elected):
    """tau = scale * sum_{t in A} w_t trim(tau_t) / sum_{t in A} w_t, with per entry
    A = {t: sgn trim(tau_t) = sgn sum_s trim(tau_s)}.

    The paper trims over the whole delta, and lets the vector's majority decide where the votes sum
    to 0. mergekit trims by tensor, a share of numel, and elects after weighting. peft does too, but
    elects before and divides by the number of those that agree.

    Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models" (2023),
    algorithm 1.
    """

    flavours: ClassVar[Flavours] = {
        "mergekit": {"trim_scope": "tensor", "density_of": "numel", "least": 1, **MERGEKIT},
        "peft": {"trim_scope": "tensor", "density_of": "numel", **PEFT},
    }

    def stack(self, tasks: Tasks) -> dict[str, Vector]:
        return self.agreed(tasks, self.trimmed(tasks))
