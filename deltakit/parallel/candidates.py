"""The cheap exchange of a dense gradient: each rank names its best entries, and those are averaged."""

from __future__ import annotations

import numpy as np
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
    mine = _largest(magnitude, count)
    named = torch.unique(torch.cat(ranks.gathered(mine.to(_index_dtype(len(gradient)))))).long()
    averaged = gradient[named]
    ranks.average(averaged)
    gradient.zero_()
    gradient[named] = averaged


def _largest(magnitude: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the `count` largest of n numbers, int64; 0 in the place of those that are zero."""
    if magnitude.device.type != "cpu":
        return torch.topk(magnitude, count, sorted=False).indices
    values = magnitude.numpy()  # NumPy's partition is several times faster than torch's topk
    threshold = np.partition(values, -count)[-count]
    above = np.flatnonzero(values >= threshold if threshold > 0 else values)[:count]
    return torch.from_numpy(np.pad(above, (0, count - len(above))))


def _index_dtype(numel: int) -> torch.dtype:
    return torch.int32 if numel <= torch.iinfo(torch.int32).max else torch.int64
