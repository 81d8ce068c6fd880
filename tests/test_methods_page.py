"""The pages of methods compared and of a sweep, drawn in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deltakit.pages.methods_page import methods_page, sweep_page
from deltakit.pages.page import write_page

if TYPE_CHECKING:
    from browser_lab import Browser

COMMON = {"version": 1, "task": "causal-lm", "budget": "100k", "metric": "accuracy"}


def _method(name: str, *values: float | None) -> dict[str, Any]:
    """A row as in compare.json, with one run per value; None for a run that failed."""
    known = [value for value in values if value is not None]
    runs = [
        {"seed": seed, "value": value, "train_seconds": 40.2, "peak_bytes_above_model": 2e8}
        if value is not None
        else {"seed": seed, "error": "</script>: not finite"}
        for seed, value in enumerate(values)
    ]
    costs = dict.fromkeys(("train_seconds", "peak_bytes_above_model"), 40.2 if known else None)
    sizes = dict.fromkeys(("trained", "extras", "bytes"), 1000 if known else None)
    mean = sum(known) / len(known) if known else None
    deviation = 0.01 if len(known) > 1 else None
    return {"method": name, "mean": mean, "deviation": deviation, **costs, **sizes, "runs": runs}


def _compared() -> str:
    methods = [
        _method("id3", 0.74, 0.76),
        _method("random", 0.79, None),
        _method("lora", *[None] * 2),
    ]
    return methods_page({**COMMON, "model": "M", "data": "D", "seeds": [0, 1], "methods": methods})


def _swept(failed: int) -> str:
    points = [
        {
            "eps": eps,
            "exp": exp,
            "value": eps + exp,
            "tensor_sparsity": 0.5,
            "sparsity_entropy": 0.5,
        }
        for eps in (0.5, 1.0)
        for exp in (-1.0, 0.0, 1.0)
    ]
    for point in points[:failed]:
        point |= {"value": None, "error": "diverged"}  # type: ignore[dict-item]
    return sweep_page({**COMMON, "method": "id3", "points": points})


@pytest.mark.parametrize(
    ("page", "texts", "charts"),
    [
        (_compared(), ["3 methods, causal-lm", "0.7500 ± 0.0100", "failed", "not finite"], 1),
        (_swept(1), ["Sweep of id3, causal-lm", "eps 1, exp 1", "diverged", "1 failed"], 2),
        (_swept(6), ["6 failed"], 0),
    ],
    ids=["methods", "sweep", "all failed"],
)
def test_results_of_several_runs(
    page: str, texts: list[str], charts: int, browser: Browser, tmp_path: Path
) -> None:
    """Every run is in the table, failed ones with their reason, and axe is content."""
    write_page(tmp_path / "report.html", page)
    browser.open(tmp_path / "report.html")
    for text in texts:
        assert text in browser.text()
    assert len(browser.all("figure")) == charts
    for scheme, width in (("light", 1280), ("dark", 360)):
        browser.scheme(scheme)  # type: ignore[arg-type]
        browser.resize(width, 800)
        assert browser.too_wide() == []
        assert browser.violations() == []
