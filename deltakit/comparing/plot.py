"""A comparison as heat-maps: how far supports overlap, and how often signs disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deltakit.comparing.compare import Comparison
from deltakit.dtypes import Array
from deltakit.figures import drawn

_NUMBERED = 12  # up to so many deltas, every cell shows its number
_MAP = "cividis"  # reads the same with any colour vision, and in grey


def plot_comparison(found: Comparison, path: Path) -> None:
    """Write a PNG with two matrices over all deltas: Jaccard overlap, and sign conflicts as a share
    of the shared entries (grey where there are none of known sign). Needs matplotlib."""
    labels = [f"{at}: {_short(delta.label)}" for at, delta in enumerate(found.deltas, 1)]
    side = 3.2 + 0.45 * len(labels)
    with drawn(path, 2 * side, side, 2) as [left, right]:
        overlap = found.matrix(lambda pair: pair.jaccard, 1.0)
        _heat_map(left, overlap, labels, "overlap of supports (Jaccard)")
        conflicts = found.matrix(lambda pair: pair.conflict_share, 0.0)
        _heat_map(right, conflicts, labels, "sign conflicts, share of shared entries")


def _heat_map(panel: Any, matrix: Array, labels: list[str], title: str) -> None:
    panel.grid(visible=False)
    panel.set_facecolor("0.8")
    image = panel.imshow(np.ma.masked_invalid(matrix), cmap=_MAP, vmin=0, vmax=1)
    places = range(len(labels))
    panel.set_xticks(places, labels, rotation=45, ha="right")
    panel.set_yticks(places, labels)
    panel.set_title(title, fontsize="medium")
    if len(labels) <= _NUMBERED:
        for (row, column), value in np.ndenumerate(matrix):
            text = "-" if np.isnan(value) else f"{value:.2f}"
            colour = "black" if np.isnan(value) or value > 0.5 else "white"
            panel.text(column, row, text, ha="center", va="center", color=colour)
    panel.figure.colorbar(image, ax=panel, shrink=0.8)


def _short(label: str) -> str:
    return label if len(label) <= 24 else f"…{label[-23:]}"
