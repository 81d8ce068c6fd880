"""Unmasking schedules: pure functions for how many entries are unmasked by the end of each step.

A schedule is `f(budget, step, steps) -> cumulative count` after 0-based `step` of `steps`; every
one is monotone and reaches the budget exactly at the last step, more steps than entries included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor, pi, sin

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import BudgetError
from deltakit.registry import Registry

Schedule = Callable[[int, int, int], int]
SCHEDULES: Registry[Schedule] = Registry("schedule")


@SCHEDULES.register("uniform", "the same number at every step", "ID3, Agarwal et al. 2024, alg. 1")
def uniform(budget: int, step: int, steps: int) -> int:
    """floor(B (t + 1) / T), in integers."""
    return budget * (step + 1) // steps


@SCHEDULES.register("linear", "a number that falls linearly to zero")
def linear(budget: int, step: int, steps: int) -> int:
    """Increments proportional to T - t, in integers."""
    left = steps - step - 1
    whole = steps * (steps + 1)
    return budget * (whole - left * (left + 1)) // whole


@SCHEDULES.register("cosine", "a number that falls as a half cosine", "RigL, Evci et al. 2020")
def cosine(budget: int, step: int, steps: int) -> int:
    """Increments proportional to 1 + cos(pi x); x + sin(pi x) / pi in all."""
    if step + 1 == steps:
        return budget
    x = (step + 1) / steps
    return min(budget, floor(budget * (x + sin(pi * x) / pi)))


@SCHEDULES.register("once", "all entries at the first step")
def once(budget: int, step: int, steps: int) -> int:
    """The whole budget at step 0."""
    return budget


def unmasking_plan(
    schedule: str | Schedule | Sequence[int], budget: int, steps: int, marks: Sequence[int] = ()
) -> Array:
    """The cumulative number of entries after each selection step, int64 [steps].

    schedule: a registered name, a function as above, or the counts per step themselves.
    marks: budget checkpoints. A mark inside a step stops that step's unmasking at the mark and
    lets the surplus join the next; so that nothing is left after the last step, marks near the
    end are reached a step early. Raises BudgetError when the steps cannot hold the marks, or a
    custom schedule does not sum to the budget.
    """
    if steps < 1:
        raise BudgetError(f"{steps} selection steps: at least one is needed")
    wanted = _cumulative(schedule, budget, steps)
    stops = sorted({m for m in marks if m < budget})
    if stops and stops[0] < 1:
        raise BudgetError(f"budget checkpoint {stops[0]} is below 1")
    if len(stops) >= steps:
        raise BudgetError(
            f"{len(stops)} budget checkpoints below the budget need at least {len(stops) + 1} "
            f"selection steps, found {steps}; train longer, name fewer, or unmask over a larger "
            "share of the steps (unmask_fraction)"
        )
    least = np.zeros(steps, np.int64)  # what must be reached so that every later mark has a step
    least[steps - len(stops) - 1 :] = [*stops, budget]
    plan, done = np.zeros(steps, np.int64), 0
    for step in range(steps):
        ahead = next((m for m in stops if m > done), budget)
        done = max(done, int(least[step]), min(int(wanted[step]), ahead))
        plan[step] = done
    return plan


def check_selections(every: int, unmask_fraction: float) -> None:
    """Raise BudgetError for an interval below one step, or a share of the steps outside (0, 1]."""
    if every < 1:
        raise BudgetError(f"every must be at least 1 step, found {every}")
    if not 0 < unmask_fraction <= 1:
        raise BudgetError(f"unmask_fraction must be in (0, 1], found {unmask_fraction}")


def selecting_steps(steps: int | None, fraction: float, total_steps: int | None) -> int | None:
    """The steps from the first on that may select: `steps`, or a share of all training steps.

    None where neither is known.
    """
    if steps is None and total_steps is not None:
        return max(1, round(fraction * total_steps))
    return steps


def _cumulative(schedule: str | Schedule | Sequence[int], budget: int, steps: int) -> Array:
    if not isinstance(schedule, str) and not callable(schedule):
        counts = np.asarray(schedule, np.int64)
        if counts.shape != (steps,) or counts.min() < 0 or counts.sum() != budget:
            raise BudgetError(
                f"a custom schedule must hold {steps} counts >= 0 that sum to {budget}, found "
                f"{counts.size} that sum to {counts.sum()}"
            )
        return np.cumsum(counts)
    function = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
    wanted = np.array([function(budget, t, steps) for t in range(steps)], np.int64)
    if wanted[-1] != budget or wanted[0] < 0 or (np.diff(wanted) < 0).any():
        raise BudgetError(
            f"schedule {schedule!r} must rise from >= 0 to {budget} in {steps} steps, "
            f"found {wanted[0]} to {wanted[-1]}"
        )
    return wanted
