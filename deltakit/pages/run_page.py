"""The page of one run: what it was told, how training went, and what came of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from deltakit.inspection import inspect
from deltakit.pages.page import page, write_page
from deltakit.run_record import Record, RunRecord, thinned
from deltakit.views.grid import layer_grid

_POINTS = 500  # of a curve, and rows of its table
_KINDS = 6  # lines that are told apart in one chart; all other kinds are one more
_CURVES = (
    *("loss", "learning_rate", "grad_norm", "entries", "examples_per_second", "tokens_per_second"),
    *("resident_bytes", "peak_resident_bytes", "cuda_bytes", "peak_cuda_bytes"),
)


def write_run_page(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write the page of the run in `folder` to `path`, whole or not at all.

    Raises MissingFileError where there is no run, DataError and FormatError for damaged files, and
    OutputError as for every output.
    """
    write_page(Path(path), run_page(RunRecord.read(folder)))


def run_page(run: RunRecord) -> str:
    """The document, below 1 MB for a run of any length; finished or not."""
    told = run.results or run.start or run.settings
    title = f"{told['method']}, {told['task']}"
    return page(title, _data(run), "run.js")


def _data(run: RunRecord) -> dict[str, Any]:
    results, start = run.results or {}, run.start
    final = results.get("final", {})
    names = list(start.get("metrics") or final.get("metrics", {}))
    metric = start.get("metric", results.get("metric"))
    evaluations = run.evaluations(names)
    return {
        "folder": str(run.folder),
        "finished": run.results is not None,
        "step": results.get("steps", run.step),
        "max_steps": start.get("max_steps"),
        "epoch": run.log[-1].get("epoch") if run.log else None,
        "seconds": max((record.get("seconds", 0) for record in run.log), default=0),
        "sessions": start.get("sessions", []),
        "metric": metric,
        "best": _best(results.get("best"), evaluations, metric),
        "budget": results.get("budget") or start.get("budget"),
        "entries": final.get("entries", next(_last(run.log, "entries"), None)),
        "extras": results.get("extras"),
        "cost": {key: results.get(key) for key in ("train_seconds", "peak_bytes_above_model")},
        "curves": {key: _xy(run.curve(key, _POINTS)) for key in _CURVES},
        "metrics": {name: _metric(evaluations, name) for name in names},
        "marks": [_mark(result) for result in [*results.get("marks", []), *_end(final)]],
        "kinds": _kinds(results.get("analyses", {}).get("history")),
        "spread": _spread(results.get("analyses", {}).get("history")),
        "delta": _delta(run.delta),
        "sweep": _sweep(run.sweep),
        "settings": dict(run.settings),
        "start": {key: start.get(key) for key in ("base", "splits", "environment")},
    }


def _xy(curve: tuple[Sequence[float], Sequence[float]]) -> dict[str, Any]:
    steps, values = curve
    return {"x": steps, "y": [_rounded(value) for value in values]}


def _metric(evaluations: Sequence[Record], name: str) -> dict[str, Any]:
    known = [record for record in evaluations if record.get(name) is not None]
    return _xy(thinned([r["step"] for r in known], [r[name] for r in known], _POINTS))


def _last(log: Sequence[Record], key: str) -> Any:
    return (record[key] for record in reversed(log) if key in record)


def _best(best: Record | None, evaluations: Sequence[Record], metric: Any) -> dict[str, Any] | None:
    """Step and value of the best evaluation; while training goes on, those of the newest one."""
    if best is not None:
        return {"step": best["step"], "value": best["metrics"].get(metric), "newest": False}
    known = [record for record in evaluations if record.get(metric) is not None]
    return (
        {"step": known[-1]["step"], "value": known[-1][metric], "newest": True} if known else None
    )


def _end(final: Record) -> list[Record]:
    return [final] if final else []


def _mark(result: Record) -> dict[str, Any]:
    told = {key: result[key] for key in ("entries", "step", "bytes", "metrics")}
    return {**told, "file": PureWindowsPath(result["path"]).name}


def _kinds(history: Record | None) -> dict[str, Any] | None:
    """Entries over steps of the kinds of tensor with most, and of all others together."""
    if history is None or len(history["steps"]) < 2:
        return None
    kinds: Mapping[str, list[int]] = history["kinds"]
    names = sorted((k for k in kinds if kinds[k][-1]), key=lambda kind: (-kinds[kind][-1], kind))
    told = {kind: kinds[kind] for kind in names[:_KINDS]}
    if others := names[_KINDS:]:
        told[f"{len(others)} other kinds"] = np.sum([kinds[kind] for kind in others], 0).tolist()
    return {"steps": history["steps"], "kinds": told}


def _spread(history: Record | None) -> dict[str, Any] | None:
    if history is None or len(history["steps"]) < 2:
        return None
    return {key: history[key] for key in ("steps", "tensor_sparsity", "sparsity_entropy")}


def _delta(path: Path | None) -> dict[str, Any] | None:
    """Where the entries of the newest delta are, from its header alone, and which base it names."""
    if path is None:
        return None
    found = inspect(path)
    base = found.header.base
    return {
        "file": path.name,
        "bytes": found.file_bytes,
        "entries": found.entries,
        "grid": layer_grid(found.tensors).as_dict(),
        "fingerprints": 0 if base is None else len(base.tensors),
    }


def _sweep(sweep: Record | None) -> dict[str, Any] | None:
    if sweep is None:
        return None
    trials = [{key: trial[key] for key in ("rate", "loss")} for trial in sweep["trials"]]
    return {"rate": sweep["rate"], "reason": sweep["reason"], "trials": trials}


def _rounded(value: float) -> float:
    """To six digits: twice what is shown, and a third of the text."""
    return value if isinstance(value, int) else float(f"{value:.6g}")
