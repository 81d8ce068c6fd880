"""Budget against metric, for a delta that lies in the folder of the run that trained it."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import FormatError
from deltakit.formats.strict_json import loads

_NO_RECORD = (AttributeError, KeyError, OverflowError, TypeError, ValueError)  # of a run


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunMetrics:
    """What a run measured at each of its budgets, the end of training last.

    method, task, metric: as the run calls them. entries, steps: int64 [n]. values: of the metric,
    float64 [n], NaN where it was not finite or not measured. files: the delta of each, by the
    file's name. at: which of these the delta itself is, or None.
    """

    method: str
    task: str
    metric: str
    entries: Array
    steps: Array
    values: Array
    files: tuple[str, ...]
    at: int | None

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers; what was not measured stays NaN."""
        return {
            "method": self.method,
            "task": self.task,
            "metric": self.metric,
            "entries": self.entries.tolist(),
            "steps": self.steps.tolist(),
            "values": self.values.tolist(),
            "files": list(self.files),
            "at": self.at,
        }


def run_metrics(delta: Path) -> RunMetrics | None:
    """What metrics.json beside a delta says; None where there is no run, or none that measured.

    A file of that name which is no record of a run counts as none: other programs write such, too.
    """
    try:
        record = loads((delta.parent / "metrics.json").read_bytes(), "metrics.json")
        found = _read(record, delta.name)
    except (OSError, FormatError, *_NO_RECORD):
        return None
    return found if np.isfinite(found.values).any() else None


def _read(record: Any, name: str) -> RunMetrics:
    metric = record["metric"]
    results = [*record["marks"], record["final"]]
    files = tuple(PureWindowsPath(result["path"]).name for result in results)  # of any system
    return RunMetrics(
        method=str(record["method"]),
        task=str(record["task"]),
        metric=str(metric),
        entries=np.array([int(result["entries"]) for result in results], np.int64),
        steps=np.array([int(result["step"]) for result in results], np.int64),
        values=np.array([_number(result["metrics"].get(metric)) for result in results]),
        files=files,
        at=files.index(name) if name in files else None,
    )


def _number(value: Any) -> float:
    number = nan if value is None else float(value)
    return number if isfinite(number) else nan
