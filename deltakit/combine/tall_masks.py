"""Consensus merging by TALL masks: only entries that matter to several tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltakit.combine.method import METHODS, Method
from deltakit.combine.tasks import Tasks, Union, Vector
from deltakit.dtypes import Array
from deltakit.errors import ConfigError


@METHODS.register("tall-masks", "sum of entries that matter to several tasks", "Wang et al., 2024")
@dataclass(frozen=True, kw_only=True)
class TallMasks(Method):
    """tau = scale * sigma where |{t: |tau_t| >= threshold * |sigma - tau_t|}| >= votes, else 0,
    with sigma = sum_t tau_t. Weights multiply tau_t beforehand.

    Source: Wang et al., "Localizing Task Information for Improved Model Merging and Compression"
    (2024; Consensus Task Arithmetic).
    """

    threshold: float = 0.4
    votes: int = 2

    def stack(self, tasks: Tasks) -> dict[str, Vector]:
        if not 1 <= self.votes <= len(tasks):
            raise ConfigError(f"{self.votes} votes of {len(tasks)} deltas are not possible")
        return {
            name: Vector(union.indices, self._combined(union))
            for name, union in tasks.unions(tasks.vectors())
        }

    def _combined(self, union: Union) -> Array:
        terms = [part.weighted for part in union.parts]
        total = union.total(terms)
        threshold = union.dtype.type(self.threshold)
        uses = (
            np.abs(term) >= threshold * np.abs(total[part.place] - term)
            for part, term in zip(union.parts, terms, strict=True)
        )
        total[union.total(uses) < self.votes] = 0
        return total
