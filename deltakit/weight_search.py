"""Searching for weights of several deltas on any objective, without gradients (LoRAHub's idea)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from scipy.optimize import minimize

from deltakit.dtypes import Array
from deltakit.errors import ConfigError, TrainingError
from deltakit.figures import drawn, metric_label

Weights = tuple[float, ...]
OPTIMIZER: Final = "COBYQA"
DECIMALS = 4  # of weights that are tried, so that those printed are those measured
MOST = 10_000  # evaluations; even a single weight has as many choices
FIRST_STEP, LAST_STEP = 0.5, 0.01  # radii of the optimizer's trust region, in weights


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One choice of weights, measured. number: from 1. origin: where the weights come from.

    value: what is minimised; infinite where the measurement was not finite.
    """

    number: int
    origin: str
    weights: Weights
    value: float
    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class WeightSearch:
    """What a search found.

    weights: one for each delta. value: what was minimised: the metric called `objective` (negated
    where greater is better) + regularization * mean |w|. reason: why these, in one line.
    evaluations: in the order in which they were made, the plain starts first.
    """

    weights: Weights
    value: float
    reason: str
    evaluations: tuple[Evaluation, ...]
    objective: str
    seed: int
    bounds: tuple[float, float]
    regularization: float

    def rows(self) -> list[list[str]]:
        """Number, origin, weights, metric and value of every evaluation; a heading first."""
        rows = [["evaluation", "origin", "weights", self.objective, "minimised"]]
        for e in self.evaluations:
            measured = f"{e.metrics.get(self.objective, math.nan):.4f}"
            rows.append([str(e.number), e.origin, show(e.weights), measured, f"{e.value:.4f}"])
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None for those that are not finite."""
        told = [
            {**asdict(e), "value": _finite(e.value)}
            | {"metrics": {name: _finite(value) for name, value in e.metrics.items()}}
            for e in self.evaluations
        ]
        return {**self._settings(), "reason": self.reason, "evaluations": told}

    def record(self) -> dict[str, Any]:
        """For a delta's provenance: every evaluation as [weights, value], and no clocks."""
        tried = [[list(e.weights), _finite(e.value)] for e in self.evaluations]
        return {**self._settings(), "evaluations": len(tried), "tried": tried}

    def _settings(self) -> dict[str, Any]:
        kept = ("value", "objective", "seed", "regularization")
        told = {name: getattr(self, name) for name in kept}
        lists = {"weights": list(self.weights), "bounds": list(self.bounds)}
        return {**lists, **told, "optimizer": OPTIMIZER}

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw every value, and the lowest so far, as PNG or SVG. Needs matplotlib."""
        numbers = [e.number for e in self.evaluations]
        values = [e.value if math.isfinite(e.value) else math.nan for e in self.evaluations]
        with drawn(Path(path), 6, 4) as [axes]:
            axes.plot(numbers, values, "o", label="measured")
            lowest = np.fmin.accumulate(values)
            axes.step(numbers, lowest, where="post", marker="", label="lowest so far")
            axes.set(xlabel="evaluation", ylabel=f"{metric_label(self.objective)}, penalised")
            axes.set_title(f"chosen: {show(self.weights)}")
            axes.legend()


def search_weights(
    measure: Callable[[Weights], Mapping[str, float]],
    count: int,
    *,
    objective: str = "loss",
    greater: bool = False,
    evaluations: int = 40,
    seed: int = 0,
    bounds: tuple[float, float] = (-1.5, 1.5),
    regularization: float = 0.05,
    say: Callable[[Evaluation], None] = lambda evaluation: None,
) -> WeightSearch:
    """Find `count` weights within `bounds` by measuring exactly `evaluations` choices of them.

    measure: weights -> metrics, of which the one called `objective` counts; greater: whether more
    of it is better. Minimised is the metric (or its negative) + regularization * mean |w|; bounds
    and penalty are those of `lorahub_learning` by Huang et al., "LoraHub" (2023). A choice whose metric is not finite counts as infinitely bad. say: told each one.

    Measured first are the plain choices: all 1, the average, and each delta alone; so the winner,
    the first of equals, is never worse than these. Then COBYQA (Ragonneau and Zhang, 2024) goes
    down from the best of them: it needs no gradients, keeps to bounds, and fits a quadratic to
    what it measured, which suits a loss that is smooth in few weights and dear to measure. In
    trials on quadratics and on losses of mixed logits (2 to 10 weights, 40 evaluations) it came
    closer than Powell, Nelder-Mead and differential evolution, whose populations are spent before
    they settle. Where it converges with evaluations left, it starts anew from a random choice,
    drawn by `seed`. Weights are tried to 4 decimals, and no choice is measured twice.

    Raises ConfigError for too few evaluations and bounds without 0 and 1, TrainingError where no
    measurement is finite. An interruption leaves nothing but what `say` was told.
    """
    check_search(count, evaluations, bounds, regularization)
    starts = plain_choices(count)
    found: dict[Weights, Evaluation] = {}

    def value_at(weights: Sequence[float] | Array, origin: str) -> float:
        rounded = np.round(np.clip(weights, *bounds), DECIMALS) + 0.0  # -0.0 is 0.0
        choice: Weights = tuple(rounded.tolist())
        if choice in found:
            return found[choice].value
        if len(found) == evaluations:
            raise _SpentError
        began = time.monotonic()
        metrics = dict(measure(choice))
        loss = -metrics[objective] if greater else metrics[objective]
        value = loss + regularization * float(np.abs(rounded).mean())
        value = value if math.isfinite(value) else math.inf
        took = time.monotonic() - began
        found[choice] = Evaluation(len(found) + 1, origin, choice, value, metrics, took)
        say(found[choice])
        return value

    def told_at(weights: Array) -> float:
        """The value, or the worst finite one, as no quadratic fits an infinity."""
        value = value_at(weights, "search")
        finite = [e.value for e in found.values() if math.isfinite(e.value)]
        return value if math.isfinite(value) else max(finite, default=0.0)

    try:
        for origin, choice in starts.items():
            value_at(choice, origin)
        _descend(told_at, best_of(found.values()).weights, bounds, seed)
    except _SpentError:
        pass
    made = tuple(found.values())
    best = best_of(made)
    if not math.isfinite(best.value):
        raise TrainingError(f"none of {len(made)} evaluations was finite; look for broken inputs")
    reason = _reason(best, made, starts, objective, regularization)
    shared = (objective, seed, bounds, regularization)
    return WeightSearch(best.weights, best.value, reason, made, *shared)


def check_search(
    count: int, evaluations: int, bounds: tuple[float, float], regularization: float
) -> None:
    """Raise the ConfigError that `search_weights` would, before anything dear is done."""
    low, high = bounds
    if not (-math.inf < low <= 0 and 1 <= high < math.inf):
        raise ConfigError(f"bounds {low:g},{high:g}: expected finite ones around 0 and 1")
    if not 0 <= regularization < math.inf:
        raise ConfigError(f"regularization {regularization:g}: expected a number of at least 0")
    if evaluations > MOST:
        raise ConfigError(f"{evaluations:,} evaluations: expected at most {MOST:,}")
    if evaluations < (starts := len(plain_choices(count))):
        raise ConfigError(
            f"{evaluations} evaluations are fewer than the {starts} plain choices to begin with "
            "(all 1, average, each delta alone); give more"
        )


def plain_choices(count: int) -> dict[str, Weights]:
    """What one would try first, by name; one choice where there is one delta."""
    if count == 1:
        return {"all 1": (1.0,)}
    alone = {f"delta {n} alone": tuple(np.eye(count)[n].tolist()) for n in range(count)}
    return {"all 1": (1.0,) * count, "average": (1 / count,) * count, **alone}


def best_of(evaluations: Iterable[Evaluation]) -> Evaluation:
    """The first of the lowest value."""
    return min(evaluations, key=lambda e: (e.value, e.number))


def show(weights: Weights) -> str:
    """Weights as `--weights` takes them."""
    return ",".join(f"{w:g}" for w in weights)


class _SpentError(Exception):
    """All evaluations have been made."""


def _descend(
    value_at: Callable[[Array], float],
    start: Sequence[float],
    bounds: tuple[float, float],
    seed: int,
) -> NoReturn:
    """Minimise from `start`, then from random choices, until `value_at` raises."""
    random = np.random.default_rng(seed)
    while True:
        minimize(
            value_at,
            np.array(start),
            method=OPTIMIZER,
            bounds=[bounds] * len(start),
            options={"initial_tr_radius": FIRST_STEP, "final_tr_radius": LAST_STEP},
        )
        start = random.uniform(*bounds, len(start)).tolist()


def _reason(
    best: Evaluation,
    made: Sequence[Evaluation],
    starts: Mapping[str, Weights],
    objective: str,
    regularization: float,
) -> str:
    plain = best_of(made[: len(starts)])
    penalty = regularization * float(np.abs(best.weights).mean())
    told = (
        f"{show(best.weights)}: {objective} {best.metrics[objective]:.4f}, with penalty "
        f"{penalty:.4f} the lowest of {len(made)} evaluations ({best.value:.4f})"
    )
    if best is plain:
        return f"{told}; no search beat {plain.origin}"
    return f"{told}; best plain choice: {plain.origin}, {plain.value:.4f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
