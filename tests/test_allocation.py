"""Allocations: exact, nested, capped, and equal to Webster's method seat by seat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakit.errors import BudgetError, ConfigError
from deltakit.selection.allocation import (
    ALLOCATIONS,
    allocate,
    parse_allocation,
    proportional_counts,
    seats,
)

TENSORS = st.lists(st.tuples(st.sampled_from([0, 1, 2, 5, 60, 1000]), st.integers(0, 60)))


@dataclass(frozen=True)
class Tensor:
    """A tensor as allocations see it."""

    name: str
    shape: tuple[int, ...]

    @property
    def live_name(self) -> str:
        return f"model.{self.name}"


MODEL = [
    Tensor("attn.q.weight", (8, 8)),
    Tensor("attn.q.bias", (8,)),
    Tensor("mlp.up.weight", (32, 8)),
    Tensor("mlp.up.bias", (32,)),
    Tensor("norm.weight", (8,)),
]
FREE = [64, 8, 256, 32, 8]


def _naive_seats(weights: list[int], caps: list[int], budget: int) -> list[int]:
    """Webster's method seat by seat, in exact fractions."""
    counts, made = [0] * len(weights), []
    for _ in range(budget):
        open_ = [i for i, w in enumerate(weights) if w and counts[i] < caps[i]]
        best = max(open_, key=lambda i: (Fraction(2 * weights[i], 2 * counts[i] + 1), -i))
        counts[best] += 1
        made.append(best)
    return made


@given(TENSORS, st.data())
def test_seats_equal_the_method_seat_by_seat(
    tensors: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Also where caps bind, and where one large tensor stands beside many small ones."""
    weights, caps = [w for w, _ in tensors], [c for _, c in tensors]
    budget = data.draw(st.integers(0, sum(c for w, c in tensors if w)))
    assert seats(weights, caps, budget).tolist() == _naive_seats(weights, caps, budget)


def test_one_large_tensor_outweighs_a_thousand_small_ones() -> None:
    """Webster's method may leave a quota by far; the small ones round to nothing."""
    counts = np.bincount(seats([500_000] + [500] * 1000, [500_000] + [500] * 1000, 100))
    assert counts.tolist() == [100]


def test_proportional_budgets_are_nested_and_bounded() -> None:
    sizes = [384 * 384] * 24 + [384 * 1536] * 12 + [384] * 60
    before = [0] * len(sizes)
    for budget in (1, 10, 1_000, 50_000, 100_000):
        counts = proportional_counts(sizes, budget)
        assert sum(counts) == budget
        assert all(a <= b <= size for a, b, size in zip(before, counts, sizes, strict=True))
        before = counts
    assert proportional_counts([2, 3], 5) == [2, 3]
    with pytest.raises(BudgetError, match="budget 6 cannot be met: 5 entries"):
        seats([2, 3], [2, 3], 6)


def _counts(allocation: str | Mapping[str, float], budget: int) -> list[int]:
    made = allocate(allocation, MODEL, FREE, budget)
    assert made is not None and made.dtype == np.int32 and len(made) == budget
    return [int(n) for n in np.bincount(made, minlength=len(MODEL))]


def test_counts_of_every_allocation() -> None:
    assert allocate("global", MODEL, FREE, 10) is None
    assert _counts("proportional", 184) == [32, 4, 128, 16, 4]
    assert _counts("uniform", 10) == [2, 2, 2, 2, 2]
    assert _counts("uniform", 94) == [26, 8, 26, 26, 8]
    assert _counts("erdos-renyi", 104) == [16, 8, 40, 32, 8]  # sums of dimensions
    assert _counts("attn=0.25,mlp=0.75", 40) == [9, 1, 27, 3, 0]
    assert _counts({"*.bias": 0.5, "attn": 0.5}, 20) == [10, 2, 0, 8, 0]  # first pattern wins


@pytest.mark.parametrize("allocation", [*list(ALLOCATIONS)[1:], "attn=0.3,*=0.7"])
def test_every_allocation_is_exact_nested_and_capped(allocation: str) -> None:
    whole = allocate(allocation, MODEL, FREE, sum(FREE))
    assert whole is not None and np.bincount(whole).tolist() == FREE
    for budget in range(0, sum(FREE), 7):
        part = allocate(allocation, MODEL, FREE, budget)
        assert part is not None and part.tolist() == whole[:budget].tolist()


def test_forbidden_entries_count_in_no_share() -> None:
    free = [10, 0, 256, 0, 8]
    made = allocate("uniform", MODEL, free, 60)
    assert made is not None and np.bincount(made).tolist() == [10, 0, 42, 0, 8]


def test_allocations_are_read_from_text_or_mappings() -> None:
    assert parse_allocation("uniform") == "uniform"
    assert parse_allocation(" *.bias = 0.25, mlp=0.75") == {"*.bias": 0.25, "mlp": 0.75}
    assert parse_allocation({"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        ("globl", "allocation 'globl': expected one of global, proportional, uniform, erdos-renyi"),
        ("a=0.5,a=0.5", "different patterns"),
        ("a=x", "expected one of"),
        ("a=0.5,b=0.6", "shares must sum to 1, found 1.1"),
        ("a=-1,b=2", r"share of 'a' must be in \(0, 1\], is -1"),
        ({}, "shares must sum to 1, found 0"),
        ({"a": float("nan")}, "must be in"),
    ],
)
def test_what_is_no_allocation_is_refused(
    allocation: str | Mapping[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_allocation(allocation)


def test_patterns_that_match_nothing_or_hold_too_little_are_refused() -> None:
    with pytest.raises(ConfigError, match="allocation pattern 'atn' matches no tensor"):
        allocate("atn=1", MODEL, FREE, 5)
    with pytest.raises(BudgetError, match="budget 9 cannot be met: 8 entries"):
        allocate("norm=1", MODEL, FREE, 9)
