"""Figures as PNG or SVG files, where matplotlib is installed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from math import lcm
from pathlib import Path
from typing import Any

from deltakit.errors import ConfigError
from deltakit.formats.atomic import replacing

SUFFIXES = (".png", ".svg")

# Okabe and Ito (2008), told apart with any colour vision; without their yellow, too pale on white.
# Dashes and markers repeat after other counts than colours, so that 140 series differ.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v")

_UNITS = {"loss": "nats", "mse": "squared units of the labels", "bleu": "0 to 100"}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def check_figure(path: Path) -> None:
    """Tell before a long computation that its figure cannot be drawn.

    Raises ConfigError for a name that ends neither in .png nor in .svg, and ModuleNotFoundError
    where matplotlib is missing.
    """
    if path.suffix.lower() not in SUFFIXES:
        found = f"ends in {path.suffix}" if path.suffix else "has no ending"
        raise ConfigError(f"{path}: the name of a figure ends in .png or .svg; this one {found}")
    import matplotlib  # noqa: F401


def metric_label(metric: str) -> str:
    """What an axis of this metric is called: its name, and its unit where it has one."""
    return f"{metric} ({_UNITS[metric]})" if metric in _UNITS else metric


@contextmanager
def drawn(
    path: Path,
    width: float,
    height: float,
    panels: int | Sequence[int] = 1,
    heights: Sequence[float] | None = None,
    title: str | None = None,
) -> Iterator[list[Any]]:
    """Yield one axes per panel, with grids, and write the file once they are drawn.

    width, height: inches; PNG has 120 dots to each. panels: how many side by side, of each row
    where there are several; the axes come row by row. heights: of the rows, relative. title: over
    all of them. Series differ by colour, dash and marker. Text in SVG is text. Equal drawings give
    equal bytes. Nothing is written when drawing fails. Raises as `check_figure` does.
    """
    check_figure(path)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks
        matplotlib.rcdefaults()  # the user's own settings would give other bytes
        matplotlib.rcParams.update(_style())
        figure = Figure(figsize=(width, height), layout="constrained")
        if title is not None:
            figure.suptitle(title)
        counts = [panels] if isinstance(panels, int) else list(panels)
        rows = figure.subfigures(len(counts), 1, squeeze=False, height_ratios=heights)[:, 0]
        placed = zip(rows, counts, strict=True)
        axes = [row.add_subplot(1, n, 1 + at) for row, n in placed for at in range(n)]
        for panel in axes:
            panel.grid(visible=True, alpha=0.3)
        yield axes
        _write_logarithms_plainly(figure)
        kind = path.suffix.lower().removeprefix(".")
        timeless = {"Date": None} if kind == "svg" else {}
        with replacing(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=120, metadata=timeless)


def _style() -> Any:  # a dict, whose keys newer releases of matplotlib list one by one
    """Settings of matplotlib that differ from its defaults."""
    from cycler import cycler

    series = {"color": _COLOURS, "linestyle": _DASHES, "marker": _MARKERS}
    length = lcm(*map(len, series.values()))
    cycled = {
        key: [kinds[at % len(kinds)] for at in range(length)] for key, kinds in series.items()
    }
    return {
        "axes.prop_cycle": cycler(**cycled),
        "axes.titlesize": "medium",
        "lines.markersize": 4.5,
        "svg.fonttype": "none",
        "svg.hashsalt": "deltakit",
        "text.parse_math": False,  # a name with dollars in it is no formula
    }


def _write_logarithms_plainly(figure: Any) -> None:
    """Label the ticks of logarithmic axes 0.01 and 1e-3; by default they are formulas."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            if not super().__call__(x, pos):  # a tick between those with labels
                return ""
            if 0.01 <= x < 1e6:
                return f"{x:g}"
            digits, _, power = f"{x:.0e}".partition("e")
            return f"{digits}e{int(power)}"

    panels = [each for panel in figure.axes for each in (panel, *panel.child_axes)]
    for axis in [axis for panel in panels for axis in (panel.xaxis, panel.yaxis)]:
        if axis.get_scale() == "log":
            axis.set_major_formatter(Plain())
            axis.set_minor_formatter(Plain(labelOnlyBase=False, minor_thresholds=(1, 0.7)))
