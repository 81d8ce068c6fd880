"""Schedules: exact sums and monotone, whatever the numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakit.errors import BudgetError
from deltakit.selection.schedules import SCHEDULES, unmasking_plan

BUDGETS = st.integers(1, 10_000)
STEPS = st.integers(1, 300)


@pytest.mark.parametrize("name", SCHEDULES.names())
@given(budget=BUDGETS, steps=STEPS)
def test_every_schedule_rises_to_exactly_the_budget(name: str, budget: int, steps: int) -> None:
    plan = unmasking_plan(name, budget, steps)
    assert len(plan) == steps and plan[-1] == budget
    assert (np.diff(plan, prepend=0) >= 0).all()


@given(budget=BUDGETS, steps=STEPS)
def test_uniform_unmasks_the_difference_of_floors(budget: int, steps: int) -> None:
    plan = unmasking_plan("uniform", budget, steps)
    steps_made = np.diff(plan, prepend=0)
    for t in range(steps):
        assert steps_made[t] == (budget * (t + 1)) // steps - (budget * t) // steps


@given(st.data())
def test_marks_are_all_hit_and_the_surplus_joins_the_next_step(data: st.DataObject) -> None:
    budget = data.draw(st.integers(2, 5000))
    marks = sorted(data.draw(st.sets(st.integers(1, budget), max_size=5)))
    steps = data.draw(st.integers(len(marks) + 1, 200))
    name = data.draw(st.sampled_from(SCHEDULES.names()))
    plan = unmasking_plan(name, budget, steps, marks)
    free = unmasking_plan(name, budget, steps)
    assert plan[-1] == budget and (np.diff(plan, prepend=0) >= 0).all()
    assert set(marks) <= set(plan.tolist())
    # Between marks the plan follows the schedule: it is behind only where it stands on a mark.
    behind = plan < free
    assert all(count in marks for count in plan[behind])


def test_a_mark_inside_a_step_stops_that_step() -> None:
    assert unmasking_plan("uniform", 100, 4, [30]).tolist() == [25, 30, 75, 100]
    assert unmasking_plan("once", 100, 3, [30, 60]).tolist() == [30, 60, 100]
    assert unmasking_plan("uniform", 100, 2, [90]).tolist() == [90, 100]  # a step early, not late


def test_custom_schedules_and_refusals() -> None:
    assert unmasking_plan([5, 0, 5], 10, 3).tolist() == [5, 5, 10]
    squares = unmasking_plan(lambda b, t, n: b * (t + 1) ** 2 // n**2, 90, 3)
    assert squares.tolist() == [10, 40, 90]
    with pytest.raises(BudgetError, match="sum to 10, found 3 that sum to 9"):
        unmasking_plan([5, 0, 4], 10, 3)
    with pytest.raises(BudgetError, match="2 budget checkpoints below the budget need at least 3"):
        unmasking_plan("once", 10, 2, [3, 4])
    with pytest.raises(BudgetError, match="at least one"):
        unmasking_plan("uniform", 10, 0)
    with pytest.raises(BudgetError, match="must rise"):
        unmasking_plan(lambda b, t, n: b - t, 10, 3)
