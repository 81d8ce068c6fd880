"""Frequency voting: only what several deltas agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from deltakit.combine.elect import Elected
from deltakit.combine.method import METHODS
from deltakit.combine.tasks import Tasks, Union, Vector
from deltakit.dtypes import Array
from deltakit.errors import ConfigError


@METHODS.register("consensus", "mean of entries whose sign several deltas share")
@dataclass(frozen=True, kw_only=True)
class Consensus(Elected):
    """tau = scale * sum_{t in A} w_t tau_t / sum_{t in A} w_t where |A| >= votes, else 0, with
    A = {t: sgn tau_t = sgn sum_s sgn tau_s}.

    One delta has one vote, whatever its magnitude: the election of TIES by frequency, as peft
    has it, with a quorum. votes: 1 is plain voting.
    """

    sign_by: Literal["total", "frequency"] = "frequency"
    votes: int = 2

    def stack(self, tasks: Tasks) -> dict[str, Vector]:
        if not 1 <= self.votes <= len(tasks):
            raise ConfigError(f"{self.votes} votes of {len(tasks)} deltas are not possible")
        return self.agreed(tasks, tasks.vectors())

    def combined(self, union: Union, signs: Array) -> Array:
        combined = super().combined(union, signs)
        agree = union.total(np.sign(self.votes_of(p)) == signs[p.place] for p in union.parts)
        combined[agree < self.votes] = 0
        return combined
