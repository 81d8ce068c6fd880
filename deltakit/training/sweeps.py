"""A sweep over eps and exp of the D3 score, as in the ID3 paper's figure 4 (Agarwal et al. 2024)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltakit.errors import ConfigError
from deltakit.figures import can_draw, drawn, metric_label
from deltakit.formats.atomic import write_bytes
from deltakit.pages.methods_page import sweep_page
from deltakit.training.cells import Cell, run_cells
from deltakit.training.config_file import resolve
from deltakit.training.prepare import Say
from deltakit.training.report_page import try_page
from deltakit.training.watch import finite


def sweep_d3(
    file: Mapping[str, Any],
    flags: Mapping[str, Any],
    *,
    eps: Sequence[float],
    exp: Sequence[float],
    force: bool = False,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Train with every pair of eps and exp; write sweep.json, sweep.csv and sweep.png.

    file, flags: all other settings, as for `resolve`; the method is one that takes both, ID3 by
    default. Runs go to `output_dir`/eps-E-exp-X; a finished one is not done again, and one that was
    interrupted goes on. Returns the content of sweep.json: a point per pair, with the task's
    metric or the error that its run ended with. Raises ConfigError and OutputExistsError before
    anything is run.
    """
    pairs = [(float(e), float(x)) for e in eps for x in exp]
    if not pairs or len(set(pairs)) < len(pairs):
        raise ConfigError("sweep: expected at least one eps and one exp, each of them once")
    cells = [_cell(file, flags, *pair) for pair in pairs]
    config = cells[0].config
    if config.eval_strategy == "no":
        raise ConfigError("sweep: eval_strategy is no, so that there is nothing to compare")
    records = run_cells(cells, force=force, say=say)
    points = [_point(pair, record) for pair, record in zip(pairs, records, strict=True)]
    metrics = [record["metric"] for record in records if "metric" in record]
    found = {
        "version": 1,
        "task": config.task,
        "method": config.method,
        "budget": config.budget,
        "metric": metrics[0] if metrics else None,
        "points": points,
    }
    folder = cells[0].folder.parent
    text = json.dumps(finite(found), indent=2, allow_nan=False)
    write_bytes(folder / "sweep.json", f"{text}\n".encode())
    write_bytes(folder / "sweep.csv", _csv(points).encode())
    _plot(found, folder / "sweep.png")
    try_page(folder / "report.html", lambda: sweep_page(found), say)
    return found


def sweep_table(found: Mapping[str, Any]) -> list[list[str]]:
    """The metric by exp (rows) and eps (columns), under a heading; found: as in sweep.json."""
    values = {(point["eps"], point["exp"]): point["value"] for point in found["points"]}
    columns = list(dict.fromkeys(e for e, _ in values))
    rows = [["exp", *(f"eps {e:g}" for e in columns)]]
    for x in dict.fromkeys(x for _, x in values):
        told = [values[e, x] for e in columns]
        rows.append([f"{x:g}", *("failed" if v is None else f"{v:.4f}" for v in told)])
    return rows


def _cell(file: Mapping[str, Any], flags: Mapping[str, Any], eps: float, exp: float) -> Cell:
    name = f"eps-{eps:g}-exp-{exp:g}"
    config = resolve(file, {**flags, "eps": eps, "exp": exp})
    settings = {**config.as_dict(), "output_dir": str(Path(config.output_dir) / name)}
    return Cell(f"eps {eps:g}, exp {exp:g}", resolve(settings, {}))


def _point(pair: tuple[float, float], record: Mapping[str, Any]) -> dict[str, Any]:
    point = {"eps": pair[0], "exp": pair[1], "value": None, "tensor_sparsity": None}
    if "error" in record:
        return {**point, "error": record["error"]}
    point["value"] = record["final"]["metrics"][record["metric"]]
    point["tensor_sparsity"] = record["analyses"]["tensor_sparsity"]
    return {**point, "sparsity_entropy": record["analyses"]["sparsity_entropy"]}


def _csv(points: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    columns = ["eps", "exp", "value", "tensor_sparsity", "sparsity_entropy", "error"]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(points)
    return text.getvalue()


def _plot(found: Mapping[str, Any], path: Path) -> bool:
    """Draw the metric against exp, one line per eps; False where nothing could be drawn."""
    known = [point for point in found["points"] if point["value"] is not None]
    if not known or not can_draw():
        return False
    with drawn(path, 6, 4) as [axes]:
        for eps in dict.fromkeys(point["eps"] for point in known):
            line = sorted((p["exp"], p["value"]) for p in known if p["eps"] == eps)
            axes.plot(*zip(*line, strict=True), label=f"eps {eps:g}")
        axes.set_xlabel("exp")
        axes.set_ylabel(metric_label(found["metric"]))
        axes.set_title(f"{found['method']}, {found['task']}, {found['budget']} entries")
        axes.legend()
    return True
