"""The pages of several runs: methods at equal budget, and a sweep over eps and exp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltakit.pages.page import page

_RUN = ("seed", "value", "error", "train_seconds", "peak_bytes_above_model")


def methods_page(found: Mapping[str, Any]) -> str:
    """The document of `deltakit train --compare`; found: as in compare.json."""
    rows = [
        {**row, "runs": [{key: run.get(key) for key in _RUN} for run in row["runs"]]}
        for row in found["methods"]
    ]
    title = f"{len(rows)} methods, {found['task']}"
    return page(title, {**found, "methods": rows}, "methods.js")


def sweep_page(found: Mapping[str, Any]) -> str:
    """The document of `deltakit sweep`; found: as in sweep.json."""
    return page(f"Sweep of {found['method']}, {found['task']}", found, "sweep.js")
