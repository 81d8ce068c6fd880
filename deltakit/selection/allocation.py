"""Allocations: how a budget is shared among tensors before any score is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum, isclose
from typing import Protocol

import numpy as np
import torch

from deltakit.budget import ALLOCATIONS
from deltakit.dtypes import Array
from deltakit.errors import BudgetError, ConfigError, nearest
from deltakit.targets.patterns import matching

Allocation = str | Mapping[str, float]


class Shared(Protocol):
    """A tensor that a budget is shared with."""

    @property
    def name(self) -> str:
        """Its name in checkpoint coordinates."""

    @property
    def live_name(self) -> str:
        """Its name in the live model."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""


def parse_allocation(allocation: Allocation) -> Allocation:
    """The name of an allocation, or pattern -> share of the budget.

    The latter is a mapping or a text such as "attention=0.5,mlp=0.5". Raises ConfigError for an
    unknown name and for shares that are not positive or do not sum to 1.
    """
    if isinstance(allocation, str):
        if allocation in ALLOCATIONS:
            return allocation
        allocation = _parse_shares(allocation)
    for pattern, share in allocation.items():
        if not 0 < share <= 1:
            raise ConfigError(f"allocation: the share of {pattern!r} must be in (0, 1], is {share}")
    total = fsum(allocation.values())
    if not isclose(total, 1, rel_tol=1e-6):
        raise ConfigError(f"allocation: the shares must sum to 1, found {total:g}")
    return dict(allocation)


def check_allocation(allocation: Allocation) -> None:
    """Raise ConfigError for what `parse_allocation` refuses."""
    parse_allocation(allocation)


def allocate(
    allocation: Allocation,
    candidates: Sequence[Shared],
    free: Sequence[int],
    budget: int,
    model: torch.nn.Module | None = None,
) -> Array | None:
    """Which candidate each entry of the budget goes to, int32 [budget]; None for "global".

    The first n seats are the allocation of budget n, so growing budgets are nested. free: entries
    per candidate that can be chosen. model: what target presets such as "attention" in a mapping
    refer to. With pattern -> share, a tensor belongs to the first pattern that matches it, shares
    are split in proportion to size, and tensors that no pattern matches get nothing. Raises
    ConfigError for a pattern that matches no tensor, BudgetError when the candidates cannot hold
    the budget.
    """
    allocation = parse_allocation(allocation)
    if allocation == "global":
        return None
    if isinstance(allocation, Mapping):
        return _by_pattern(allocation, candidates, free, budget, model)
    if allocation == "uniform":
        weights = [1] * len(free)
    elif allocation == "erdos-renyi":
        weights = [max(1, sum(candidate.shape)) for candidate in candidates]
    else:
        weights = list(free)
    return seats(weights, free, budget)


def seats(weights: Sequence[float], caps: Sequence[int], budget: int) -> Array:
    """Which tensor each entry of the budget goes to, int32 [budget], in shares like the weights.

    The highest quotients weight / (j - 1/2) get the seats (Webster 1832, Sainte-Lague 1910), ties
    to the earlier tensor; no tensor gets more than its cap. The first n seats are those of budget
    n. Raises BudgetError when the tensors of positive weight cannot hold the budget.
    """
    weight = np.asarray(weights, np.float64)
    cap = np.where(weight > 0, np.asarray(caps, np.int64), 0)
    if budget > cap.sum():
        raise BudgetError(
            f"budget {budget} cannot be met: {cap.sum()} entries can be chosen from the tensors "
            "that the allocation gives a share"
        )
    if not budget:
        return np.zeros(0, np.int32)
    # Seat j (from 0) of a tensor falls due at time (2 j + 1) / weight. Without caps the first
    # guess of a time suffices, as no tensor is more than half a seat behind its share.
    time = (2 * budget + len(weight)) / weight[cap > 0].sum()
    while np.minimum(cap, due := _due(weight, time)).sum() < budget:
        time *= 2
    due = np.minimum(cap, due + 1)  # one to spare for rounding
    owners = np.repeat(np.arange(len(weight), dtype=np.int32), due)
    turn = np.arange(len(owners)) - np.repeat(np.cumsum(due) - due, due)
    order = np.argsort((2 * turn + 1) / weight[owners], kind="stable")[:budget]
    return np.asarray(owners[order])


def proportional_seats(sizes: Sequence[int], budget: int) -> Array:
    """Seats when the budget is shared in proportion to size, int32 [budget]; see `seats`."""
    return seats(sizes, sizes, budget)


def proportional_counts(sizes: Sequence[int], budget: int) -> list[int]:
    """Entries per tensor when the budget is shared in proportion to size; sums to the budget."""
    return [int(n) for n in np.bincount(seats(sizes, sizes, budget), minlength=len(sizes))]


def _due(weight: Array, time: float) -> Array:
    """Seats per tensor that fall due by `time`, caps aside, int64."""
    return np.asarray(np.floor((time * weight + 1) / 2).astype(np.int64))


def _parse_shares(text: str) -> dict[str, float]:
    shares: dict[str, float] = {}
    for part in text.split(","):
        pattern, equals, share = part.rpartition("=")
        pattern = pattern.strip()
        try:
            number = float(share)
        except ValueError:
            equals = ""
        if not equals or pattern in shares:
            raise ConfigError(
                f"allocation {text!r}: expected one of {', '.join(ALLOCATIONS)} or shares of "
                f'different patterns such as "attention=0.5,mlp=0.5"{nearest(text, [*ALLOCATIONS])}'
            )
        shares[pattern] = number
    return shares


def _by_pattern(
    shares: Mapping[str, float],
    candidates: Sequence[Shared],
    free: Sequence[int],
    budget: int,
    model: torch.nn.Module | None,
) -> Array:
    """Seats of the patterns, each handed on to the pattern's tensors in their own order."""
    names: dict[str, str | None] = {c.live_name: c.name for c in candidates}
    members: list[list[int]] = []
    left = list(range(len(candidates)))
    for pattern in shares:
        hits = matching(pattern, names, "allocation pattern", model)
        members.append([n for n in left if candidates[n].live_name in hits])
        left = [n for n in left if candidates[n].live_name not in hits]
    room = [sum(free[n] for n in mine) for mine in members]
    groups = seats(list(shares.values()), room, budget)
    made = np.zeros(budget, np.int32)
    for group, mine in enumerate(members):
        places = np.flatnonzero(groups == group)
        inner = seats([free[n] for n in mine], [free[n] for n in mine], len(places))
        made[places] = np.asarray(mine, np.int32)[inner]
    return made
