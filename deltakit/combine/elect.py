"""Electing signs: each entry takes one sign, and those that disagree with it are left out.

Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models" (2023), section 3;
the forms of mergekit and of peft where they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from deltakit.combine.method import Method
from deltakit.combine.tasks import Part, Tasks, Union, Vector, Vectors
from deltakit.dtypes import Array

# Options by which the peers' elections come out.
MERGEKIT: dict[str, Any] = {"elect": "weighted", "tie": "positive", "rounding": "float"}
PEFT: dict[str, Any] = {"tie": "positive", "combine": "count", "rounding": "float"}


@dataclass(frozen=True, kw_only=True)
class Elected(Method):
    """A method that elects a sign per entry and combines the values v_t that agree with it.

    elect: the votes are the values ("unweighted") or weight * value ("weighted"; then a negative
    weight turns the vote, and the value, around). sign_by: the sign of the sum of all votes
    ("total") or of the sum of their signs ("frequency"). tie: where that is 0, the sign that most
    entries of the whole stack have ("majority", and none where that is 0 too) or +1 ("positive").
    combine: sum(w v) / sum(w) over those that agree ("mean"; a sum of weights of 0 counts as 1),
    sum(w v) / their number ("count") or sum(w v) ("sum").
    """

    elect: Literal["unweighted", "weighted"] = "unweighted"
    sign_by: Literal["total", "frequency"] = "total"
    tie: Literal["majority", "positive"] = "majority"
    combine: Literal["mean", "count", "sum"] = "mean"

    def agreed(self, tasks: Tasks, vectors: Sequence[Vectors]) -> dict[str, Vector]:
        """Elect signs over the task vectors and combine what agrees, tensor by tensor."""
        made, ties, balance = {}, [], 0
        for name, union in tasks.unions(vectors):
            signs = self.signs(union)
            tied = signs == 0
            if self.tie == "positive":
                signs[tied] = 1
            elif tied.any():
                ties.append((name, tied, union.restricted(tied)))
            balance += int(signs.sum(dtype=np.int64))
            made[name] = Vector(union.indices, self.combined(union, signs))
        majority = np.int8(np.sign(balance))
        for name, tied, rest in ties:  # the majority is known only when all tensors were seen
            made[name].values[tied] = self.combined(rest, np.full(len(rest.indices), majority))
        return made

    def signs(self, union: Union) -> Array:
        """The sign of the votes of each entry, int8 [u]: -1, 0 or 1."""
        votes = [self.votes_of(part) for part in union.parts]
        if self.sign_by == "frequency":
            votes = [np.sign(vote) for vote in votes]
        return np.asarray(np.sign(union.total(votes)).astype(np.int8))

    def votes_of(self, part: Part) -> Array:
        """What a delta votes with, [n]: its values, or weighted ones."""
        return part.weighted if self.elect == "weighted" else part.values

    def combined(self, union: Union, signs: Array) -> Array:
        """The combination [u] of the values that agree with `signs`, int8 [u]."""
        total, divisor = np.zeros((2, len(union.indices)), union.dtype)
        for part in union.parts:
            agree = np.sign(self.votes_of(part)) == signs[part.place]
            values = part.weighted
            place = part.place[agree]
            total[place] += values[agree]
            divisor[place] += part.weight if self.combine == "mean" else 1
        if self.combine != "sum":
            divisor[divisor == 0] = 1
            total /= divisor
        return np.asarray(total)
