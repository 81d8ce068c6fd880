"""Figures as PNG files, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deltakit.formats.atomic import replacing


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


@contextmanager
def drawn(path: Path, width: float, height: float, panels: int = 1) -> Iterator[list[Any]]:
    """Yield one axes per panel, side by side with grids, and write the file once they are drawn.

    width, height: inches, at 120 dots each. Nothing is written when drawing fails.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, panels, 1 + number) for number in range(panels)]
    for panel in axes:
        panel.grid(visible=True, alpha=0.3)
    yield axes
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
