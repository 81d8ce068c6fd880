"""Allocations: how a budget is shared among tensors before any score is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import BudgetError, ConfigError

ALLOCATIONS = ("global", "proportional")


def check_allocation(name: str) -> None:
    """Raise ConfigError for a name that is no allocation."""
    if name not in ALLOCATIONS:
        raise ConfigError(f"unknown allocation {name!r}; known: {', '.join(ALLOCATIONS)}")


def proportional_seats(sizes: Sequence[int], budget: int) -> Array:
    """Which tensor each entry of the budget goes to, int32 [budget].

    sizes: elements per tensor, in tensor order. The highest quotients size / (j - 1/2) get the
    seats (Webster 1832, Sainte-Lague 1910), ties to the earlier tensor, and no tensor gets more
    than it has. The first n seats are the allocation of budget n, so growing budgets are nested.
    Raises BudgetError when the budget is larger than all tensors together.
    """
    total = sum(sizes)
    if budget > total:
        raise BudgetError(f"budget {budget} is more than the {total} weights of the targets")
    waits, owners = [], []
    for tensor, size in enumerate(sizes):
        seats = min(size, ceil(budget * size / total) + 2) if total else 0
        waits.append((2 * np.arange(seats, dtype=np.float64) + 1) / max(size, 1))
        owners.append(np.full(seats, tensor, np.int32))
    order = np.argsort(np.concatenate(waits), kind="stable") if waits else np.zeros(0, np.int64)
    return np.asarray(np.concatenate(owners)[order][:budget] if owners else order.astype(np.int32))


def proportional_counts(sizes: Sequence[int], budget: int) -> list[int]:
    """Entries per tensor when the budget is shared in proportion to size; sums to the budget."""
    seats = proportional_seats(sizes, budget)
    return [int(n) for n in np.bincount(seats, minlength=len(sizes))]
