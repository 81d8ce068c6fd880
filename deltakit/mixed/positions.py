"""Relative position biases of T5 and its kin, which are made once for all rows.

The embedding behind them looks up distances [queries, keys], without a batch. So the attention's
`compute_bias` runs once per task, and the biases [1, heads, queries, keys] stand in the batch's
order; all layers that share them add them as they would add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from deltakit.mixed.changes import Change
from deltakit.mixed.module import Changed, Place, in_place_of
from deltakit.mixed.rows import Rows
from deltakit.mixed.watch import Watch

LAYER = "relative_attention_bias"
METHOD = "compute_bias"


def makes_positions(attention: torch.nn.Module) -> bool:
    """Whether a module makes relative position biases the way T5's attention does."""
    return callable(getattr(type(attention), METHOD, None)) and hasattr(attention, LAYER)


class BatchedPositions:
    """Takes the place of an attention's `compute_bias`. changes: task -> its change."""

    def __init__(self, attention: torch.nn.Module, changes: Mapping[int, Change]) -> None:
        place = Place(getattr(attention, LAYER), "weight")
        self.attention = attention
        self._changed = {task: [Changed(place, change)] for task, change in changes.items()}

    def method(self, rows: Rows, watch: Watch) -> Callable[..., torch.Tensor]:
        """`compute_bias` that returns [batch, heads, queries, keys]."""
        compute = getattr(self.attention, METHOD)

        def compute_bias(*args: Any, **named: Any) -> torch.Tensor:
            biases = {}
            for task in sorted(set(rows.tasks)):
                with in_place_of(self._changed.get(task, [])), watch.running():
                    biases[task] = compute(*args, **named)
            whole = torch.cat([biases[task] for task in rows.tasks])
            return whole.repeat_interleave(rows.batch // len(rows), 0)

        return compute_bias
