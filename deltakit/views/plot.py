"""The figures of one delta in one picture: where its entries are, how large, and since when."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.dtypes import Array
from deltakit.figures import drawn, metric_label
from deltakit.heat_map import heat_map
from deltakit.inspection import Inspection
from deltakit.views.delta_view import DeltaView
from deltakit.views.grid import LayerGrid
from deltakit.views.histogram import Histogram
from deltakit.views.labels import shortened
from deltakit.views.run_metrics import RunMetrics, run_metrics

_LINES = 7  # kinds of tensor drawn one by one, each in a colour of its own; the rest together
_TALLEST = 40.0  # inches of a heat-map, for any number of layers
_CURVES = 4.0  # inches of the row below
_SIGNS = (  # an area and a dashed line, so that neither hides the other
    {"color": "#0072B2", "fill": True, "alpha": 0.45},
    {"color": "#D55E00", "linestyle": "--", "linewidth": 1.6},
)

Draw = Callable[[Any], None]


def plot_delta(found: Inspection, view: DeltaView, path: Path) -> None:
    """Write PNG or SVG, by the suffix: all of `view` that is known, and the metrics of the run in
    whose folder the delta lies. Needs matplotlib; raises ConfigError for another suffix."""
    maps = _maps(view.grid)
    curves: list[Draw] = []
    if view.histogram is not None:
        curves.append(partial(draw_changes, histogram=view.histogram))
    if view.unmasking is not None:
        history = view.unmasking
        curves.append(partial(draw_unmasking, steps=history.steps, kinds=history.by_kind()))
    run = run_metrics(found.path) if isinstance(found.path, Path) else None
    if run is not None:
        curves.append(partial(draw_budgets, run=run))
    rows, columns = len(view.grid.rows), len(view.grid.columns)
    heights = [min(3.2 + 0.18 * rows, _TALLEST), *([_CURVES] if curves else [])]
    width = max(len(maps) * (3.2 + 0.28 * columns), 5.0 * len(curves), 6.0)
    panels = [len(maps), *([len(curves)] if curves else [])]
    with drawn(path, width, sum(heights), panels, heights, _title(found)) as axes:
        for panel, draw in zip(axes, [*maps, *curves], strict=True):
            draw(panel)


def draw_changes(panel: Any, histogram: Histogram) -> None:
    """The histogram of |change| by sign, both axes logarithmic."""
    edges = np.maximum(histogram.edges, np.finfo(np.float64).smallest_subnormal)
    signs = (("increased", histogram.positive), ("decreased", histogram.negative))
    for (label, counts), style in zip(signs, _SIGNS, strict=True):
        panel.stairs(counts, edges, label=f"{label}: {counts.sum():,}", **style)
    others = ("zeros", "unchanged"), ("unknown", "not known"), ("non_finite", "not finite")
    for name, label in others:
        if count := getattr(histogram, name):
            panel.plot([], [], " ", label=f"{label}: {count:,}")
    panel.set(title="size of the changes", xlabel="|change| of a weight", ylabel="entries per bin")
    if histogram.bins:
        panel.set(xscale="log", yscale="log", ylim=(0.7, None))
    panel.legend(fontsize="small")


def draw_unmasking(panel: Any, steps: Sequence[int] | Array, kinds: Mapping[str, Any]) -> None:
    """Entries over the steps of training, int64 [S] for each kind of tensor; the largest kinds one
    by one."""
    largest = sorted(kinds, key=lambda kind: -kinds[kind][-1])
    told, rest = largest[:_LINES], largest[_LINES:]
    for kind, label in zip(told, shortened(told), strict=True):
        panel.plot(steps, kinds[kind], label=label, markevery=0.12)
    if rest:
        together = np.sum([kinds[kind] for kind in rest], axis=0)
        panel.plot(steps, together, "k:", label=f"{len(rest)} other kinds")
    panel.set(title="unmasking by kind of tensor", xlabel="training step", ylabel="entries")
    _count(panel.yaxis)
    panel.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))


def draw_budgets(panel: Any, run: RunMetrics) -> None:
    """The metric of a run at each of its budgets; a ring around the delta itself."""
    panel.plot(run.entries, run.values, "o-", label=run.method)
    if run.at is not None:
        at = slice(run.at, run.at + 1)
        ring = {"markersize": 12, "fillstyle": "none", "label": "this delta"}
        panel.plot(run.entries[at], run.values[at], "o", **ring)
    panel.set(title=f"budget against metric, {run.task}", xlabel="budget (entries)")
    panel.set_ylabel(metric_label(run.metric))
    _count(panel.xaxis)
    panel.legend(fontsize="small")


def _maps(grid: LayerGrid) -> list[Draw]:
    """Density, and the mean change where it is known."""
    rows, columns = shortened(grid.rows), shortened(grid.columns)

    def draw(panel: Any, matrix: Array, title: str, label: str, grey: str) -> None:
        heat_map(panel, matrix, rows, columns, label)
        panel.set(title=title, xlabel=f"kind of tensor (grey: {grey})", ylabel="block")

    density = partial(
        draw,
        matrix=100 * grid.density,
        title="density",
        label="entries (% of the weights)",
        grey="no such tensor, white: no entry",
    )
    change = partial(
        draw,
        matrix=grid.mean_change,
        title="mean size of the changes",
        label="mean |change| of a weight",
        grey="none known, white: 0",
    )
    return [density, change] if np.isfinite(grid.mean_change).any() else [density]


def _title(found: Inspection) -> str:
    name = found.path.name if isinstance(found.path, Path) else str(found.path)
    entries = f"{found.entries:,} {'entry' if found.entries == 1 else 'entries'}"
    tensors = len(found.tensors)
    return f"{name}: {entries} in {tensors:,} {'tensor' if tensors == 1 else 'tensors'}"


def _count(axis: Any) -> None:
    """Ticks at whole numbers, written 25k."""
    from matplotlib.ticker import EngFormatter

    axis.get_major_locator().set_params(integer=True)
    axis.set_major_formatter(EngFormatter(sep=""))
