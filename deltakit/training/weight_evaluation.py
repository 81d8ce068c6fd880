"""Measuring a stack of deltas for any choice of their weights, on a model loaded once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from deltakit.combine.method import Method
from deltakit.combine.tasks import Tasks
from deltakit.delta import SparseDelta
from deltakit.dtypes import Array
from deltakit.errors import ConfigError, nearest
from deltakit.live.apply import applied
from deltakit.stacking import combined
from deltakit.training.evaluate import Evaluator

LOSS = "loss"


@dataclass(frozen=True, slots=True)
class StackEvaluation:
    """Weights -> metrics. tasks: the deltas, checked against the base of `ready`, by `method`.

    extras: those of the stack, whatever the weights are. metric: the one that must be finite.
    """

    ready: Evaluator
    tasks: Tasks
    method: Method
    extras: Mapping[str, Array]
    metric: str

    def __call__(self, weights: Sequence[float]) -> dict[str, float]:
        """Stack the deltas, apply the stack, measure, and take it back bit for bit.

        Where the model's outputs are not finite, `metric` is NaN and stands alone.
        """
        ready, delta = self.ready, self.candidate(weights)
        with applied(ready.model, delta, base=ready.base):
            found = ready.predict()
            if not np.isfinite(found.reduced).all():  # an argmax would hide it
                return {self.metric: math.nan}
            return ready.metrics(found)

    def candidate(self, weights: Sequence[float]) -> SparseDelta:
        """What `stack` makes with these weights, without base identity and provenance."""
        names = self.tasks.names()
        pairs = zip(self.tasks, weights, strict=True)
        weighted = [task._replace(weights=dict.fromkeys(names, w)) for task, w in pairs]
        tasks = replace(self.tasks, tasks=weighted, notes=[])
        return SparseDelta(tensors=combined(tasks, self.method), extras=self.extras)


def choose_objective(known: Sequence[str], asked: str) -> str:
    """The metric of a task that `asked` names: "loss" is the squared error where there is none.

    Raises ConfigError for one that the task does not have.
    """
    if asked == LOSS and LOSS not in known and "mse" in known:
        return "mse"
    if asked not in known:
        raise ConfigError(
            f"objective {asked!r} is no metric of this task; expected one of {', '.join(known)}"
            f"{nearest(asked, known)}"
        )
    return asked
