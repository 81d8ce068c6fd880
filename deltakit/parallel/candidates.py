"""The cheap exchange of a dense gradient: each rank names its best entries, and those are averaged."""

from __future__ import annotations

import torch

from deltakit.parallel.ranks import Ranks

SHARE = 0.01  # of a tensor's elements that each rank names


def average_candidates(
    ranks: Ranks, gradient: torch.Tensor, magnitude: torch.Tensor, count: int
) -> None:
    """Average a flat gradient where some rank has one of its `count` largest; zero elsewhere.

    magnitude: flat, non-negative, what this rank ranks its entries by. An entry that is large on
    average, but among the first of no rank, is missed; that is the mode's one inexactness.
    """
    count = min(count, len(gradient))
    mine = torch.topk(magnitude, count, sorted=False).indices
    named = torch.unique(torch.cat(ranks.gathered(mine.to(_index_dtype(len(gradient)))))).long()
    averaged = gradient[named]
    ranks.average(averaged)
    gradient.zero_()
    gradient[named] = averaged


def _index_dtype(numel: int) -> torch.dtype:
    return torch.int32 if numel <= torch.iinfo(torch.int32).max else torch.int64
