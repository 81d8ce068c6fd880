"""What a run ends with: metrics.json, rows of budget against metric, and a plot of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltakit.budget import format_bytes
from deltakit.figures import can_draw, drawn, metric_label
from deltakit.formats.atomic import write_bytes
from deltakit.training.watch import finite

_NUMBERS = re.compile(r"\[\n([-+.,\w\s]*)\]")  # a list of numbers, which goes on one line


def write_metrics(record: Mapping[str, Any], path: Path) -> None:
    """Save metrics.json atomically; numbers that JSON lacks become null."""
    text = json.dumps(finite(record), indent=2, ensure_ascii=False, allow_nan=False)
    text = _NUMBERS.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text)
    write_bytes(path, f"{text}\n".encode())


def budget_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """Budget, step, metrics, size and file of every mark and of the end, under a heading.

    record: as in metrics.json. All columns but the last are numbers.
    """
    results = [*record["marks"], record["final"]]
    names = list(record["final"]["metrics"])
    rows = [["budget", "step", *names, "size", "file"]]
    for result in results:
        values = [_number(result["metrics"].get(name)) for name in names]
        size = format_bytes(result["bytes"])
        entries = f"{result['entries']:,}"
        rows.append([entries, str(result["step"]), *values, size, result["path"]])
    return rows


def remarks(record: Mapping[str, Any]) -> list[str]:
    """What the table does not say: a budget not reached, extras, and the best delta."""
    lines = []
    budget, extras, best = record["budget"], record["extras"], record["best"]
    if budget["reached"] < budget["resolved"]:
        lines.append(f"reached {budget['reached']:,} of {budget['resolved']:,} entries")
    if extras["weights"]:
        names = ", ".join(extras["names"])
        lines.append(f"beside the budget: {extras['weights']:,} weights trained densely ({names})")
    if best is not None:
        metric = record["metric"]
        value = _number(best["metrics"][metric])
        lines.append(f"best {metric} {value} at step {best['step']}: {best['path']}")
    return lines


def plot(record: Mapping[str, Any], path: Path) -> bool:
    """Draw budget against the run's metric as PNG; False where nothing could be drawn.

    That is so without matplotlib and without evaluations.
    """
    metric = record["metric"]
    points = [
        (result["entries"], result["metrics"][metric])
        for result in [*record["marks"], record["final"]]
        if metric in result["metrics"]
    ]
    if not points or not can_draw():
        return False
    with drawn(path, 6, 4) as [axes]:
        axes.plot(*zip(*points, strict=True), "o-")
        axes.set_xlabel("budget (entries)")
        axes.set_ylabel(metric_label(metric))
        axes.set_title(f"{record['method']}, {record['task']}")
    return True


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"
