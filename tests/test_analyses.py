"""Analyses of a support over training, against counting by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltakit as dk
from deltakit.analyses import distances, total_distance, unmasking_history
from deltakit.errors import ConfigError, DeltaError
from deltakit.training.analysis_report import analyses, plot_unmasking

NAMES = ["layer.0.a", "layer.0.b", "layer.1.a", "layer.1.b"]


def _delta(
    orders: dict[str, list[int] | None], counts: dict[str, int] | None = None
) -> dk.SparseDelta:
    tensors = {}
    for name, order in orders.items():
        count = len(order) if order is not None else (counts or {})[name]
        tensors[name] = dk.TensorDelta(
            name=name,
            shape=(4, 10),
            dtype="float32",
            mode="add",
            indices=np.arange(count) * 2,
            values=np.arange(1, count + 1, dtype=np.float32),
            order=order if order is None else np.array(order),
        )
    return dk.SparseDelta(tensors=tensors)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=4))
def test_history_equals_truncation_at_every_step(orders: list[list[int]]) -> None:
    """Entries of each tensor by the end of a step, counted one by one."""
    delta = _delta(dict(zip(NAMES, orders, strict=False)))
    history = unmasking_history(delta, steps=range(10))
    for row, step in enumerate(range(10)):
        by_hand = [sum(at <= step for at in order) for order in orders]
        assert history.counts[row].tolist() == by_hand
        assert history.entries[row] == sum(by_hand)
        assert history.tensor_sparsity[row] == by_hand.count(0) / len(by_hand)
        shares = [count / sum(by_hand) for count in by_hand if count]
        entropy = -sum(share * math.log(share) for share in shares)
        most = math.log(len(by_hand)) or 1.0
        assert history.sparsity_entropy[row] == pytest.approx(entropy / most, abs=1e-12)
    assert history.entries[-1] == delta.nnz
    assert set(unmasking_history(delta).steps) == {at for order in orders for at in order}


def test_entropy_spans_zero_to_one() -> None:
    """All in one tensor, and the same number everywhere, of any number of tensors."""
    candidates = dict.fromkeys(NAMES, (4, 10))
    one = unmasking_history(_delta({NAMES[0]: [0, 1, 2]}), candidates=candidates)
    assert one.sparsity_entropy.tolist() == [0, 0, 0]
    assert one.tensor_sparsity.tolist() == [0.75] * 3
    even = unmasking_history(_delta({name: [0, 1] for name in NAMES}), candidates=candidates)
    np.testing.assert_allclose(even.sparsity_entropy, 1)
    two = unmasking_history(_delta({name: [0, 1] for name in NAMES[:2]}))
    np.testing.assert_allclose(two.sparsity_entropy, 1)


def test_kinds_add_up() -> None:
    """Every entry belongs to one kind; kinds are names without their numbers."""
    delta = _delta({NAMES[0]: [0, 3], NAMES[1]: [1], NAMES[2]: [3, 3, 4]})
    history = unmasking_history(delta)
    kinds = history.by_kind()
    assert history.steps.tolist() == [0, 1, 3, 4]
    assert {k: c.tolist() for k, c in kinds.items()} == {
        "layer.*.a": [1, 1, 4, 5],
        "layer.*.b": [0, 1, 1, 1],
    }
    assert (sum(kinds.values()) == history.entries).all()
    np.testing.assert_allclose(history.densities[-1], [2 / 40, 1 / 40, 3 / 40])


def test_fixed_supports_are_there_from_the_start() -> None:
    """No order is recorded for them."""
    history = unmasking_history(_delta({NAMES[0]: None}, {NAMES[0]: 7}), steps=[0, 5])
    assert history.entries.tolist() == [7, 7]


def test_a_delta_of_nothing_has_a_history() -> None:
    """Nothing is divided by zero."""
    history = unmasking_history(
        dk.SparseDelta(tensors={}), steps=[0], candidates=dict.fromkeys(NAMES, (1,))
    )
    assert (history.tensor_sparsity[0], history.sparsity_entropy[0]) == (1, 0)


def test_distance_is_the_norm_of_the_dense_difference(tmp_path: Path) -> None:
    """Per tensor and over all; it survives the file."""
    delta = _delta({NAMES[0]: [0, 1, 2], NAMES[2]: [5]})
    dk.save(delta, tmp_path / "d.sdelta")
    moved = distances(dk.load(tmp_path / "d.sdelta"))
    assert moved == {NAMES[0]: pytest.approx(math.sqrt(14)), NAMES[2]: 1.0}
    assert total_distance(moved) == pytest.approx(math.sqrt(15))
    zeroed = dk.TensorDelta(
        name="w",
        shape=(4,),
        dtype="float32",
        mode="set",
        indices=np.array([1]),
        values=np.zeros(1, np.float32),
    )
    with pytest.raises(DeltaError, match="without base values"):
        distances(dk.SparseDelta(tensors={"w": zeroed}))


def test_refusals() -> None:
    """Said in one line."""
    delta = _delta({NAMES[0]: [0, 1]})
    with pytest.raises(ConfigError, match=r"must rise, found \[1, 1\]"):
        unmasking_history(delta, steps=[1, 1])
    with pytest.raises(ConfigError, match=r"'layer\.0\.a' is not among the candidates"):
        unmasking_history(delta, candidates={"w": (1,)})


def test_report_of_a_run_and_its_plot(tmp_path: Path) -> None:
    """At most 33 steps are told, the first and the last among them; the plot is a PNG."""
    delta = _delta({NAMES[0]: list(range(3, 23)), NAMES[1]: [100]})
    found = analyses(delta, dict.fromkeys(NAMES, (4, 10)))
    assert found["history"]["entries"][0] == 1
    assert found["history"]["entries"][-1] == delta.nnz == 21
    assert len(found["history"]["steps"]) == 33
    assert found["tensor_sparsity"] == 0.5
    assert found["tensors"][NAMES[3]] == {"entries": 0, "density": 0.0, "distance": 0.0}
    assert found["distance"] == pytest.approx(total_distance(distances(delta)))
    assert plot_unmasking(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    fixed = analyses(_delta({NAMES[0]: None}, {NAMES[0]: 3}), {NAMES[0]: (4, 10)})
    assert not plot_unmasking(fixed, tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()
