"""The largest change of all wins, entry by entry."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltakit.combine.method import METHODS, Method
from deltakit.combine.tasks import Tasks, Union, Vector
from deltakit.dtypes import Array


@METHODS.register(
    "max-magnitude", "the largest change wins, entry by entry", "Marczak et al., 2024"
)
@dataclass(frozen=True, kw_only=True)
class MaxMagnitude(Method):
    """tau = scale * tau_t with t = argmax_s |tau_s| per entry; the first of equals.

    Weights multiply tau_t beforehand.

    Source: Marczak et al., "MagMax: Leveraging Model Merging for Seamless Continual Learning"
    (2024).
    """

    def stack(self, tasks: Tasks) -> dict[str, Vector]:
        return {
            name: Vector(union.indices, _largest(union))
            for name, union in tasks.unions(tasks.vectors())
        }


def _largest(union: Union) -> Array:
    best = np.zeros(len(union.indices), union.dtype)
    for part in union.parts:
        values = part.weighted
        wins = np.abs(values) > np.abs(best[part.place])
        best[part.place[wins]] = values[wins]
    return best
