"""A matrix drawn in colours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deltakit.dtypes import Array

_MAP = "cividis"  # reads the same with any colour vision, and in grey
_NO_VALUE, _ZERO, _BORDER = "0.85", "white", "0.97"
_LABELS = 120  # up to so many rows or columns, each has its label


def heat_map(
    panel: Any,
    matrix: Array,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    *,
    limits: tuple[float, float] | None = None,
    write: Callable[[float], str] | None = None,
) -> None:
    """Draw a matrix on axes of matplotlib, with a bar that tells what the colours mean.

    matrix: float64 [rows, columns], not negative; NaN is grey. label: of the bar, with the unit.
    limits: of the colours. By default they span the values: from 0 on, or on a logarithmic scale
    where values differ by a factor of 10 or more, with zeros in white. write: the text of each cell
    ("" for none).
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    logarithmic, low, high = (False, *limits) if limits else _range(matrix)
    panel.grid(visible=False)
    panel.set_facecolor(_NO_VALUE)
    shown = np.where(matrix == 0, low / 2, matrix) if logarithmic else matrix
    image = panel.pcolormesh(  # cell by cell, where imshow would put a bitmap into an SVG
        np.ma.masked_invalid(shown),
        cmap=colormaps[_MAP].with_extremes(under=_ZERO),
        norm=(LogNorm if logarithmic else Normalize)(low, high),
        edgecolors=_BORDER,
        linewidth=0.4,
    )
    panel.invert_yaxis()
    _name(panel.set_xticks, columns, rotation=90 if max(map(len, columns), default=0) > 3 else 0)
    _name(panel.set_yticks, rows)
    if write is not None:
        for (row, column), value in np.ndenumerate(matrix):
            dark = not np.isnan(value) and value < (low + high) / 2
            at = (column + 0.5, row + 0.5)
            colour = "white" if dark else "black"
            panel.text(*at, write(value), ha="center", va="center", color=colour)
    zeros = logarithmic and bool((matrix == 0).any())
    beside = panel.inset_axes((1.02, 0.0, 0.04, 1.0))  # as tall as the map, however tall that is
    extend = "min" if zeros else "neither"
    panel.figure.colorbar(image, cax=beside, label=label, extend=extend, extendfrac=0.03)


def _range(matrix: Array) -> tuple[bool, float, float]:
    """Whether colours are logarithmic, and the values at which they begin and end."""
    told = matrix[np.isfinite(matrix) & (matrix > 0)]
    if not told.size:
        return False, 0.0, 1.0
    low, high = float(told.min()), float(told.max())
    return (True, low, high) if high >= 10 * low else (False, 0.0, high)


def _name(set_ticks: Any, labels: Sequence[str], **given: Any) -> None:
    """Label rows or columns, or every few of them where they are very many."""
    every = -(-len(labels) // _LABELS) or 1
    size = "small" if len(labels) <= 40 else "x-small"
    set_ticks(np.arange(0, len(labels), every) + 0.5, labels[::every], fontsize=size, **given)
