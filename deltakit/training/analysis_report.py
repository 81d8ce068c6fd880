"""What a run says about its support: `analyses` in metrics.json, and unmasking.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.analyses import UnmaskingHistory, distances, total_distance, unmasking_history
from deltakit.delta import SparseDelta
from deltakit.errors import DeltaError
from deltakit.figures import can_draw, drawn
from deltakit.views.plot import draw_unmasking

_POINTS = 33  # steps told of a run's history: every 32nd part of the time until the last entry


def analyses(delta: SparseDelta, candidates: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Sparsity, entropy and distance at the end, and how the budget of kinds of tensor grew.

    candidates: name -> shape of every tensor that could have entries. Distances are null where set
    mode comes without base values.
    """
    history = _sampled(delta, candidates)
    try:
        moved = distances(delta)
    except DeltaError:
        moved = {}
    tensors = {
        name: {
            "entries": int(history.counts[-1, column]),
            "density": float(history.densities[-1, column]),
            "distance": moved.get(name, None if name in delta.tensors else 0.0),
        }
        for column, name in enumerate(history.names)
    }
    return {
        "tensor_sparsity": float(history.tensor_sparsity[-1]),
        "sparsity_entropy": float(history.sparsity_entropy[-1]),
        "distance": total_distance(moved) if moved else None,
        "tensors": tensors,
        "history": {
            "steps": history.steps.tolist(),
            "entries": history.entries.tolist(),
            "tensor_sparsity": history.tensor_sparsity.tolist(),
            "sparsity_entropy": history.sparsity_entropy.tolist(),
            "kinds": {kind: counts.tolist() for kind, counts in history.by_kind().items()},
        },
    }


def plot_unmasking(found: Mapping[str, Any], path: Path) -> bool:
    """Draw `analyses` over steps as PNG: entries per kind of tensor, sparsity and entropy.

    False where nothing could be drawn: without matplotlib, and for a support that never grew.
    """
    history = found["history"]
    steps = history["steps"]
    if len(steps) < 2 or not can_draw():
        return False
    with drawn(path, 11, 4.5, 2) as [left, right]:
        draw_unmasking(left, steps, history["kinds"])
        right.plot(steps, history["tensor_sparsity"], label="tensor sparsity", markevery=0.12)
        right.plot(steps, history["sparsity_entropy"], label="sparsity entropy", markevery=0.12)
        right.set(xlabel="training step", ylabel="share, 0 to 1", ylim=(0, 1.02))
        right.set_title("tensors without entries, evenness over tensors")
        right.legend(fontsize="small")
    return True


def _sampled(delta: SparseDelta, candidates: Mapping[str, Sequence[int]]) -> UnmaskingHistory:
    """The history at evenly spaced steps, the first and the last with a new entry included."""
    orders = [t.order for t in delta.tensors.values() if t.order is not None and t.nnz]
    first = min((int(order.min()) for order in orders), default=0)
    last = max((int(order.max()) for order in orders), default=0)
    steps = np.unique(np.linspace(first, last, _POINTS).round().astype(np.int64))
    return unmasking_history(delta, steps=steps.tolist(), candidates=candidates)
