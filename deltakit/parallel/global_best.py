"""The best of all processes' candidates, found exactly without gathering any of them.

The least score that still wins is found digit by digit, from counts that are added up over
processes (radix selection); ties at it go to the earlier tensor, then to the lower index. What is
exchanged depends on the number of tensors and pools, not on how many entries are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from deltakit.parallel.ranks import Ranks

_BITS = 8  # of a float32 score that are settled per round
_BINS = 2**_BITS


class Candidates(NamedTuple):
    """This process's best entries of one pool, best first, at most as many as the pool holds.

    scores: float32 [m], above zero. owners: tensor numbers [m]. Ties are in tie order.
    """

    scores: torch.Tensor
    owners: torch.Tensor


def winners(
    ranks: Ranks, pools: Sequence[Candidates], wanted: Sequence[int], pool_of: Sequence[int]
) -> tuple[list[torch.Tensor], list[int]]:
    """Which candidates are among the `wanted` best of all processes: bool [m] per pool.

    Also how many each pool lacks because all processes together have too few. pool_of: the pool of
    each tensor; parts of a tensor follow one another by rank.
    """
    device = pools[0].scores.device
    pool = torch.cat([torch.full_like(p.owners, n) for n, p in enumerate(pools)])
    scores = torch.cat([p.scores for p in pools]).contiguous().view(torch.int32).long()
    owners = torch.cat([p.owners for p in pools])
    left = torch.tensor(wanted, dtype=torch.int64, device=device)
    least, left, found = _least_winning(ranks, scores, pool, left)
    above, ties = scores > least[pool], scores == least[pool]
    tied = torch.bincount(owners[ties], minlength=len(pool_of))
    room = in_order(ranks, tied, pool_of, left.tolist())
    place = torch.arange(len(ties), device=device)[ties]
    first = torch.full((len(pool_of),), len(ties), device=device)
    first = first.scatter_reduce(0, owners[ties], place, "amin")
    among = torch.cumsum(ties, 0)[ties] - torch.cumsum(ties, 0)[first[owners[ties]]]
    keep = above.clone()
    keep[place] = among < room[owners[ties]]
    lacking = [max(0, k - n) for k, n in zip(wanted, found.tolist(), strict=True)]
    return list(torch.split(keep, [len(p.scores) for p in pools])), lacking


def in_order(
    ranks: Ranks, mine: torch.Tensor, pool_of: Sequence[int], wanted: Sequence[int]
) -> torch.Tensor:
    """How many of each tensor's `mine` [T] this process gives where each pool wants so many.

    They are taken in tensor order, within a tensor in order of rank.
    """
    offered = torch.stack(ranks.gathered(mine)).T  # [T, ranks]
    pools = torch.tensor(pool_of, device=mine.device)
    given = torch.zeros_like(offered)
    for pool, most in enumerate(wanted):
        members = pools == pool
        these = offered[members]
        before = these.reshape(-1).cumsum(0).view_as(these) - these
        given[members] = torch.minimum((most - before).clamp(min=0), these)
    return given[:, ranks.rank]


def _least_winning(
    ranks: Ranks, scores: torch.Tensor, pool: torch.Tensor, left: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per pool the least winning score as a number, how many of those that equal it win, and how
    many candidates there are in all. scores: the bits of positive floats, which are in their order."""
    least = torch.zeros_like(left)
    found = torch.zeros_like(left)
    alive = torch.ones_like(pool, dtype=torch.bool)
    for shift in range(32 - _BITS, -1, -_BITS):
        digits = (scores >> shift) % _BINS
        bins = torch.bincount((pool * _BINS + digits)[alive], minlength=len(left) * _BINS)
        counts = bins.view(len(left), _BINS)
        ranks.add(counts)
        if shift == 32 - _BITS:
            found = counts.sum(1)
        reached = counts.flip(1).cumsum(1).flip(1)  # of this digit or higher
        digit = ((reached >= left[:, None]).sum(1) - 1).clamp(min=0)
        left = left - (reached - counts).gather(1, digit[:, None])[:, 0]
        least += digit << shift
        alive &= digits == digit[pool]
    return least, left, found
