"""Ranking the entries of all targets by measured scores, exactly and one tensor at a time."""

from __future__ import annotations

import numpy as np
import torch

from deltakit.dtypes import Array
from deltakit.errors import BudgetError
from deltakit.selection.heuristics import Measurement
from deltakit.selection.methods import Chosen, Scene
from deltakit.selection.topk import TopK

LEAST = float(np.finfo(np.float32).min)
PART = 2**20  # scores that are looked at in one go


def rank(
    measurement: Measurement, scene: Scene, count: int, seats: Array | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` best entries that may be chosen, best first: (tensor [count], index [count]).

    Ties go to the earlier tensor, then to the lower index. seats: which tensor each rank belongs
    to, int [count], or None where all tensors compete. Entries that score -inf or NaN are never
    chosen; raises BudgetError where too few others are left.
    """
    tensors = len(scene.targets)
    if seats is None:
        pools = [TopK(count, floor=LEAST)] * tensors
    else:
        pools = [TopK(int(k), floor=LEAST) for k in np.bincount(seats, minlength=tensors)]
    for target, pool in zip(scene.targets, pools, strict=True):
        if pool.k:
            _offer(pool, target.number, measurement.scores(target.number), target.blocked())
    results = [pool.result() for pool in dict.fromkeys(pools)]
    found = sum(len(owners) for owners, _, _ in results)
    if found < count:
        raise BudgetError(
            f"the budget asks for {count} entries and only {found} may be chosen by their scores; "
            "lower the budget, use allocation global, or look for gradients that are not finite"
        )
    owners = torch.cat([owner.cpu() for owner, _, _ in results])
    indices = torch.cat([index.cpu() for _, index, _ in results])
    if seats is not None:
        # Grouped by tensor now; the stable order of the seats says where each belongs.
        places = torch.from_numpy(np.argsort(seats, kind="stable"))
        owners = torch.empty_like(owners).index_copy_(0, places, owners)
        indices = torch.empty_like(indices).index_copy_(0, places, indices)
    return owners, indices


def support_of(
    owners: torch.Tensor, indices: torch.Tensor, measurement: Measurement
) -> list[Chosen]:
    """Ranked entries as a support: sorted by index, per tensor, with the values to start from."""
    chosen = []
    for number in torch.unique(owners).tolist():
        mine = indices[owners == number].sort().values
        start = None if measurement.values is None else measurement.values(number, mine)
        chosen.append(Chosen(number, mine.numpy(), values=start))
    return chosen


def _offer(pool: TopK, number: int, scores: torch.Tensor, blocked: Array) -> None:
    flat = scores.detach().reshape(-1)
    taken = torch.from_numpy(blocked).to(flat.device)
    for start in range(0, len(flat), PART):
        part = flat[start : start + PART].float()
        open_ = part >= pool.threshold
        here = taken[(taken >= start) & (taken < start + PART)] - start
        open_[here] = False
        near = open_.nonzero().view(-1)
        pool.offer(number, part[near], start + near, part[near])
