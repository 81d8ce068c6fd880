"""When the entries of a delta joined, from the order of one tensor after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from deltakit.analyses import UnmaskingHistory
from deltakit.delta import TensorDelta
from deltakit.dtypes import Array
from deltakit.views.grid import Counted

POINTS = 65  # steps told at most: every 64th part of the time until the last entry


class Joined(NamedTuple):
    """When the entries of one tensor joined.

    steps: int64 [S], rising. totals: int64 [S], entries by the end of each of these steps.
    """

    steps: Array
    totals: Array


def joined(tensor: TensorDelta) -> Joined | None:
    """The steps at which entries of one tensor joined; None where it records no order."""
    if tensor.order is None:
        return None
    steps, counts = np.unique(tensor.order, return_counts=True)
    return Joined(steps, counts.cumsum())


def history_of(
    tensors: Iterable[Counted], known: Mapping[str, Joined | None]
) -> UnmaskingHistory | None:
    """The history of all tensors together; known: name -> when its entries joined.

    At most 65 evenly spaced steps are told, the first and the last with a new entry among them. A
    tensor without order counts as there from the first of them on. None where entries did not join
    over time: no order is recorded, or all of one step.
    """
    ends = [(j.steps[0], j.steps[-1]) for j in known.values() if j is not None and j.steps.size]
    first = min((int(first) for first, _ in ends), default=0)
    last = max((int(last) for _, last in ends), default=0)
    if first == last:
        return None
    parts = POINTS - 1
    steps = np.array(sorted({first + (last - first) * at // parts for at in range(POINTS)}))
    given = list(tensors)
    return UnmaskingHistory(
        steps=steps,
        names=tuple(tensor.name for tensor in given),
        numels=np.array([tensor.numel for tensor in given], np.int64),
        counts=np.stack([_totals(t.nnz, known[t.name], steps) for t in given], axis=1),
    )


def _totals(nnz: int, known: Joined | None, steps: Array) -> Array:
    """Entries by the end of each of `steps`, int64 [S]."""
    if known is None:
        return np.full(len(steps), nnz, np.int64)
    upto = np.searchsorted(known.steps, steps, side="right")
    return np.concatenate([np.zeros(1, np.int64), known.totals])[upto]
