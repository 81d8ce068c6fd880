"""A view of a whole file adds up to the file, and to nothing that needs torch or matplotlib."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_deltas import FOLDER as GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from deltakit.analyses import unmasking_history
from deltakit.changes import Changes
from deltakit.delta import SparseDelta, TensorDelta
from deltakit.errors import ChecksumError
from deltakit.formats.sdelta import load, save
from deltakit.inspection import inspect
from deltakit.views.delta_view import DeltaView
from deltakit.views.histogram import Histogram
from deltakit.views.occupancy import occupancy
from deltakit.views.run_metrics import run_metrics
from deltakit.views.unmasking import POINTS, history_of, joined


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.sdelta")))
def test_every_entry_of_every_sort_of_delta_is_counted(name: str) -> None:
    """Set mode without base values, all dtypes, seeded supports, adapters, nothing at all."""
    path = GOLDEN / f"{name}.sdelta"
    view, delta = DeltaView.of(inspect(path)), load(path)
    assert view.histogram is not None
    assert view.grid.entries.sum() == view.histogram.entries == delta.nnz
    assert list(view.tensors) == list(view.changes) == list(delta.tensors)
    for one, seen in view.tensors.items():
        tensor = delta.tensors[one]
        assert seen.histogram.entries == seen.occupancy.cells.sum() == tensor.nnz
        assert view.changes[one] == Changes.of(tensor)
        changes = view.changes[one]
        assert seen.histogram.counts.sum() == changes.known - changes.zeros
        assert seen.histogram.unknown == changes.unknown
        assert seen.histogram.non_finite == changes.non_finite
    if view.unmasking is not None:
        assert view.unmasking.entries[-1] == delta.nnz
    json.dumps(view.as_dict())


def _ordered(name: str, order: list[int] | None, nnz: int) -> TensorDelta:
    return TensorDelta(
        name=name,
        shape=(4, 10),
        dtype="float32",
        mode="add",
        indices=np.arange(nnz),
        values=np.ones(nnz),
        order=order,
    )


ORDERS = st.lists(st.none() | st.lists(st.integers(0, 300) | st.just(2**53 + 1), max_size=9))


@given(ORDERS.filter(lambda orders: len(orders) < 5))
def test_history_is_that_of_the_whole_delta(orders: list[list[int] | None]) -> None:
    """At the same steps; it begins with an entry and ends at the support."""
    made = [
        _ordered(f"layer.{at}.w", order, 3 if order is None else len(order))
        for at, order in enumerate(orders)
    ]
    found = history_of(made, {tensor.name: joined(tensor) for tensor in made})
    told = {step for order in orders if order is not None for step in order}
    if len(told) < 2:
        assert found is None
        return
    assert found is not None
    delta = SparseDelta(tensors={tensor.name: tensor for tensor in made})
    whole = unmasking_history(delta, steps=found.steps.tolist())
    assert (found.names, found.numels.tolist()) == (whole.names, whole.numels.tolist())
    assert (found.counts == whole.counts).all()
    assert len(found.steps) <= POINTS
    assert (found.steps[0], found.steps[-1]) == (min(told), max(told))
    assert found.entries[-1] == delta.nnz


def _many(count: int) -> SparseDelta:
    random = np.random.default_rng(count)
    tensors = {}
    for at in range(count):
        name = f"layer.{at}.weight"
        tensors[name] = TensorDelta(
            name=name,
            shape=(300, 500),
            dtype="float32",
            mode="add",
            indices=np.sort(random.choice(150_000, 600, replace=False)),
            values=random.standard_normal(600) * 10.0 ** random.integers(-30, 30, 600),
        )
    return SparseDelta(tensors=tensors)


def test_a_view_stays_small(tmp_path: Path) -> None:
    """The more tensors, the coarser each; parts of the file are those of the tensors alone."""
    for count, bins in ((2, 64), (500, 10)):
        delta = _many(count)
        save(delta, tmp_path / f"{count}.sdelta")
        view = DeltaView.of(inspect(tmp_path / f"{count}.sdelta"))
        assert len(json.dumps(view.as_dict(), separators=(",", ":"))) < 700_000
        assert view.histogram is not None
        assert view.histogram.bins <= 64
        finest = [Histogram.of(tensor) for tensor in delta.tensors.values()]
        whole = Histogram.combined(finest).widened(view.histogram.step)
        assert view.histogram.as_dict() == whole.as_dict()
        for seen, fine, tensor in zip(
            view.tensors.values(), finest, delta.tensors.values(), strict=True
        ):
            assert seen.histogram.as_dict() == fine.widened(seen.histogram.step).as_dict()
            assert seen.occupancy.as_dict() == occupancy(tensor, bins).as_dict()


def test_a_header_alone_gives_the_grid(tmp_path: Path) -> None:
    """As of a delta on the Hub: nothing of the file is read any more."""
    path = tmp_path / "d.sdelta"
    save(_many(3), path)
    found = replace(inspect(path), remote=True)
    path.unlink()
    view = DeltaView.of(found)
    assert view.grid.entries.sum() == 1800
    assert np.isnan(view.grid.mean_change).all()
    assert (view.histogram, view.unmasking, dict(view.tensors)) == (None, None, {})


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "d.sdelta"
    save(_many(2), path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match="differ from their digest"):
        DeltaView.of(inspect(path))


def _record(**other: Any) -> dict[str, Any]:
    marks = [
        {
            "entries": n,
            "step": n // 10,
            "metrics": {"loss": 1 / n},
            "path": f"RUN/budget-{n}.sdelta",
        }
        for n in (100, 200)
    ]
    final = {"entries": 400, "step": 50, "metrics": {"loss": None}, "path": "RUN\\delta.sdelta"}
    told = {"method": "id3", "task": "causal-lm", "metric": "loss"}
    return {**told, "marks": marks, "final": final, **other}


def test_a_run_tells_its_budgets_and_which_the_delta_is(tmp_path: Path) -> None:
    """Of the delta at a mark, at the end (recorded on any system), and of another one."""
    (tmp_path / "metrics.json").write_text(json.dumps(_record()))
    for name, at in [("budget-200.sdelta", 1), ("delta.sdelta", 2), ("small.sdelta", None)]:
        found = run_metrics(tmp_path / name)
        assert found is not None
        assert found.at == at
        assert (found.method, found.task, found.metric) == ("id3", "causal-lm", "loss")
        assert found.entries.tolist() == [100, 200, 400]
        assert found.steps.tolist() == [10, 20, 50]
        np.testing.assert_array_equal(found.values, [0.01, 0.005, np.nan])
        assert set(found.as_dict()) >= {"entries", "values", "at"}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"metric": NaN}',
        json.dumps(_record(marks=[], final=_record()["final"])),  # nothing measured
        json.dumps(_record(final={**_record()["final"], "metrics": []})),
        json.dumps(_record(final={**_record()["final"], "entries": 2**80})),
        json.dumps(_record(final={**_record()["final"], "path": None})),
        json.dumps(_record(final={**_record()["final"], "metrics": {"loss": "low"}})),
    ],
)
def test_what_is_no_record_of_a_run_counts_as_none(tmp_path: Path, content: str) -> None:
    """Other programs write files of that name, too."""
    assert run_metrics(tmp_path / "delta.sdelta") is None
    (tmp_path / "metrics.json").write_text(content)
    assert run_metrics(tmp_path / "delta.sdelta") is None
