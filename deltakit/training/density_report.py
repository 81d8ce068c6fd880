"""Curvature and distance against density, and density.png.

Xu and Zhang (2024, "Random masking finds winning tickets for parameter-efficient fine-tuning",
figure 4) find that sparser masks see a flatter loss and end further from the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deltakit.analyses import distances, total_distance
from deltakit.errors import DeltaError
from deltakit.figures import can_draw, drawn
from deltakit.formats.sdelta import load
from deltakit.formats.seeded import seeded_support
from deltakit.selection.allocation import proportional_counts
from deltakit.training.calibration import TrainerCalibration
from deltakit.training.curvature import Support, hessian_norm
from deltakit.training.trainer import SparseTrainer

_PARTS = (64, 16, 4, 1)  # norms are taken of these parts of a support, and of all of it

Row = dict[str, Any]


def travelled(files: Mapping[int, Path], total_weights: int) -> list[Row]:
    """Entries, density and distance from the base of deltas, by number of entries.

    Distances are null where set mode comes without base values.
    """
    rows: list[Row] = []
    for entries, path in sorted(files.items()):
        try:
            distance = total_distance(distances(load(path)))
        except DeltaError:
            distance = None
        density = entries / total_weights
        rows.append({"entries": entries, "density": density, "distance": distance})
    return rows


def hessian_norms(trainer: SparseTrainer, total_weights: int, seed: int) -> list[Row]:
    """Entries, density and Hessian norm of a trained support and of random parts of it.

    Of the loss on one training batch, at the weights as they are. A part of a random mask is a
    sparser random mask. Costs up to 30 backward passes per row, through the gradient's own graph.
    """
    data = TrainerCalibration(trainer)
    batch = next(data.batches(seed))
    model: Any = trainer.model
    model.eval()
    targets = trainer.tuner.engine.entries.targets
    support = {t.live_name: t.indices for t in targets if len(t.indices)}
    rows: list[Row] = []
    for part in _PARTS:
        thinned = thin(support, part, seed)
        entries = sum(map(len, thinned.values()))
        if entries and (not rows or entries > rows[-1]["entries"]):
            norm = hessian_norm(model, lambda: data.loss(model, batch), thinned)
            rows.append({"entries": entries, "density": entries / total_weights, "norm": norm})
    return rows


def thin(support: Support, part: int, seed: int) -> dict[str, torch.Tensor]:
    """One `part`-th of a support, drawn at random, each tensor in proportion to its entries."""
    sizes = [len(indices) for indices in support.values()]
    counts = proportional_counts(sizes, sum(sizes) // part)
    return {
        name: indices[torch.from_numpy(seeded_support(seed, name, len(indices), count))]
        for (name, indices), count in zip(support.items(), counts, strict=True)
        if count
    }


def plot_density(norms: Sequence[Row], moved: Sequence[Row], path: Path) -> bool:
    """Draw Hessian norm and distance against density as PNG, on logarithmic axes.

    A curve needs two points. False where there is none, and without matplotlib.
    """
    curves = {
        label: [(row["density"], row[key]) for row in rows if row[key]]
        for label, key, rows in (
            ("Hessian norm", "norm", norms),
            ("distance from the base (l2 norm)", "distance", moved),
        )
    }
    told = {label: points for label, points in curves.items() if len(points) > 1}
    if not told or not can_draw():
        return False
    with drawn(path, 4.5 * len(told), 4, len(told)) as panels:
        for axes, (label, points) in zip(panels, told.items(), strict=True):
            axes.plot(*zip(*points, strict=True), "o-")
            axes.set(xscale="log", yscale="log", ylabel=label)
            axes.set_xlabel("density (entries / weights of the base)")
    return True
