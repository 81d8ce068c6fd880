"""The page of one delta: where its entries are, how large, when they joined, what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.analyses import UnmaskingHistory
from deltakit.inspection import Inspection
from deltakit.pages.page import page
from deltakit.views.delta_view import DeltaView
from deltakit.views.grid import LayerGrid
from deltakit.views.run_metrics import run_metrics

_KINDS = 6  # lines that are told apart in one chart; all other kinds are one more
_SUMMARY = (
    *("path", "format_version", "entries", "extra_weights", "density_of_base"),
    *("density_of_touched", "bytes", "bits_per_index", "entropy_bits_per_index", "changes"),
    *("extras", "config", "provenance"),
)
_TENSOR = (
    *("name", "shape", "dtype", "trained_dtype", "value_dtype", "mode", "entries", "density"),
    *("coding", "seed", "bytes", "bits_per_index", "entropy_bits_per_index"),
)
_CHANGES = ("known", "least", "most", "mean", "first_step", "last_step")


def delta_page(found: Inspection, view: DeltaView) -> str:
    """The document that shows `found`, below 1 MB for as many as a thousand tensors of any size.

    view: of the same delta. Raises ChecksumError and FormatError for a file that is damaged.
    """
    title = found.path.name if isinstance(found.path, Path) else str(found.path)
    return page(title, _data(found, view), "tensor.js", "layers.js", "sources.js", "delta.js")


def _data(found: Inspection, view: DeltaView) -> dict[str, Any]:
    told = found.as_dict()
    metrics = run_metrics(found.path) if isinstance(found.path, Path) else None
    return {
        **{key: told[key] for key in _SUMMARY},
        "remote": found.remote,
        "base": _base(found),
        "adapter": _adapter(told["adapter"]),
        "grid": _grid(view.grid, [tensor.name for tensor in found.tensors]),
        "histogram": None if view.histogram is None else view.histogram.as_dict(),
        "unmasking": None if view.unmasking is None else _unmasking(view.unmasking),
        "run": None if metrics is None else metrics.as_dict(),
        "tensors": _tensors(told["tensors"], view),
    }


def _tensors(told: list[dict[str, Any]], view: DeltaView) -> dict[str, list[Any]]:
    """Name of a fact -> that of each tensor: of thousands the names of facts are most of the text."""
    facts = {key: [_rounded(tensor[key]) for tensor in told] for key in _TENSOR}
    views = [view.tensors[name] for name in facts["name"] if name in view.tensors]
    changes = [tensor["changes"] for tensor in told]
    return {
        **facts,
        "changes": [each and _rounded({key: each[key] for key in _CHANGES}) for each in changes],
        "histogram": [each.histogram.as_dict() for each in views],
        "occupancy": [each.occupancy.as_dict() for each in views],
    }


def _grid(grid: LayerGrid, names: list[str]) -> dict[str, Any]:
    """Cells with tensors only, as [row, column, entries, density, mean |change|, tensors]."""
    at = {name: number for number, name in enumerate(names)}
    cells = [
        [
            *(row, column, int(grid.entries[row, column])),
            _rounded(float(grid.density[row, column])),
            _rounded(float(grid.mean_change[row, column])),
            [at[name] for name in held],
        ]
        for row, line in enumerate(grid.names)
        for column, held in enumerate(line)
        if held
    ]
    return {"rows": grid.rows, "columns": grid.columns, "cells": cells}


def _unmasking(history: UnmaskingHistory) -> dict[str, Any]:
    """Entries over steps of the kinds with most entries, and of all others together."""
    kinds = history.by_kind()
    names = sorted(kinds, key=lambda kind: (-int(kinds[kind][-1]), kind))
    told = {kind: kinds[kind].tolist() for kind in names[:_KINDS]}
    if others := names[_KINDS:]:
        told[f"{len(others)} other kinds"] = np.sum([kinds[kind] for kind in others], 0).tolist()
    return {"steps": history.steps.tolist(), "kinds": told}


def _base(found: Inspection) -> dict[str, Any] | None:
    """The base without the fingerprints, which say nothing to a reader."""
    base = found.header.base
    return None if base is None else {**asdict(base), "tensors": len(base.tensors)}


def _adapter(adapter: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if adapter is None else {**adapter, "stands_at": len(adapter["stands_at"])}


def _rounded(value: Any) -> Any:
    """Numbers to six digits, also inside: twice what is shown, and a third of the text."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
