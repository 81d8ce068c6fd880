"""A comparison as heat-maps: how far supports overlap, and how often signs disagree."""

from __future__ import annotations

from math import isnan
from pathlib import Path

from deltakit.comparing.compare import Comparison
from deltakit.figures import drawn
from deltakit.heat_map import heat_map

_NUMBERED = 12  # up to so many deltas, every cell shows its number


def plot_comparison(found: Comparison, path: Path) -> None:
    """Write PNG or SVG, by the suffix: two matrices over all deltas, of Jaccard overlap and of sign
    conflicts as a share of the shared entries (grey where there are none of known sign). Needs
    matplotlib; raises ConfigError for another suffix."""
    labels = [f"{at}: {_short(delta.label)}" for at, delta in enumerate(found.deltas, 1)]
    numbers = [str(at) for at in range(1, 1 + len(labels))]
    height = max(3.0, 1.6 + 0.45 * len(labels))
    overlap = found.matrix(lambda pair: pair.jaccard, 1.0)
    conflicts = found.matrix(lambda pair: pair.conflict_share, 0.0)
    told = (
        (overlap, "overlap of supports", "shared / all entries (Jaccard)"),
        (conflicts, "sign conflicts", "conflicts / shared entries"),
    )
    with drawn(path, 2 * (height + 2.4), height, 2) as panels:
        for panel, (matrix, title, label) in zip(panels, told, strict=True):
            write = _number if len(labels) <= _NUMBERED else None
            heat_map(panel, matrix, labels, numbers, label, limits=(0.0, 1.0), write=write)
            panel.set(title=title, xlabel="delta", ylabel="delta")


def _number(value: float) -> str:
    return "-" if isnan(value) else f"{value:.2f}"


def _short(label: str) -> str:
    return label if len(label) <= 24 else f"…{label[-23:]}"
