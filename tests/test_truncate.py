"""Truncation is exact: the law is a naive sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakit.delta import BaseIdentity, Fingerprint, SparseDelta, TensorDelta
from deltakit.errors import BaseMismatchError, BudgetError, ConfigError, DeltaError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import identify
from deltakit.truncation import top, truncate


@st.composite
def deltas(draw: st.DrawFn) -> SparseDelta:
    """Deltas of up to four add tensors with few distinct values, so that ties are the rule."""
    tensors = {}
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True, min_size=1)):
        indices = sorted(draw(st.sets(st.integers(0, 30), max_size=12)))
        values = [draw(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0])) for _ in indices]
        order = [draw(st.integers(0, 3)) for _ in indices]
        tensors[name] = TensorDelta(
            name=name,
            shape=(31,),
            dtype="float32",
            mode="add",
            indices=np.array(indices, np.int64),
            values=np.array(values, np.float32),
            order=np.array(order, np.int64),
        )
    return SparseDelta(tensors=tensors, base=BaseIdentity(total_weights=1000))


def entries(delta: SparseDelta) -> list[tuple[str, int, float, int]]:
    """Every entry as (tensor, index, value, step), in tensor order."""
    return [
        (name, int(i), float(v), int(s))
        for name, t in delta.tensors.items()
        for i, v, s in zip(t.indices, t.values, t.order, strict=True)  # type: ignore[arg-type]
    ]


@given(deltas(), st.integers(0, 50), st.sampled_from(["magnitude", "order"]))
def test_equals_a_naive_sort(delta: SparseDelta, count: int, by: str) -> None:
    """The best by score, then tensor order, then lower index; exactly min(count, nnz)."""
    score = (lambda e: -abs(e[2])) if by == "magnitude" else (lambda e: e[3])
    expected = sorted(entries(delta), key=lambda e: (score(e), e[0], e[1]))[:count]
    found = truncate(delta, count, by)  # type: ignore[arg-type]
    assert sorted(entries(found)) == sorted(expected)
    assert found.nnz == min(count, delta.nnz)


@given(deltas(), st.integers(0, 50), st.integers(0, 50), st.sampled_from(["magnitude", "order"]))
def test_smaller_budgets_nest(delta: SparseDelta, a: int, b: int, by: str) -> None:
    """Truncating twice is truncating to the smaller budget, and supports nest."""
    small, large = sorted((a, b))
    once = truncate(delta, small, by)  # type: ignore[arg-type]
    twice = truncate(truncate(delta, large, by), small, by)  # type: ignore[arg-type]
    assert entries(once) == entries(twice)
    assert set(entries(once)) <= set(entries(truncate(delta, large, by)))  # type: ignore[arg-type]


@given(deltas(), st.integers(0, 50), st.sampled_from(["magnitude", "order"]))
def test_is_idempotent(delta: SparseDelta, count: int, by: str) -> None:
    """A delta that meets the budget comes back as it is, provenance included."""
    once = truncate(delta, count, by)  # type: ignore[arg-type]
    assert truncate(once, count, by).equals(once)  # type: ignore[arg-type]


@given(st.lists(st.integers(-3, 3)), st.integers(-1, 12))
def test_top_prefers_the_first_of_equals(scores: list[int], count: int) -> None:
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: max(count, 0)]
    assert np.flatnonzero(top(np.array(scores), count)).tolist() == sorted(best)


def test_a_share_resolves_against_the_base_and_is_recorded_as_a_number() -> None:
    tensor = _add("w", [0, 1, 2], [3.0, 1.0, 2.0])
    delta = SparseDelta(tensors={"w": tensor}, base=BaseIdentity(total_weights=2000))
    small = truncate(delta, "0.1%")
    assert small.tensors["w"].indices.tolist() == [0, 2]
    assert small.provenance["lineage"] == [
        {"operation": "truncate", "budget": 2, "by": "magnitude", "from": 3}
    ]


def test_a_share_of_an_unknown_base_is_refused() -> None:
    delta = SparseDelta(tensors={"w": _add("w", [0], [1.0])})
    with pytest.raises(BudgetError, match="the size of the base is not known"):
        truncate(delta, "50%")


def test_lineage_grows_and_the_rest_of_provenance_stays() -> None:
    delta = SparseDelta(
        tensors={"w": _add("w", [0, 1, 2], [3.0, 1.0, 2.0])}, provenance={"task": "news"}
    )
    twice = truncate(truncate(delta, 2), 1)
    assert twice.provenance["task"] == "news"
    assert [step["budget"] for step in twice.provenance["lineage"]] == [2, 1]
    assert dict(delta.provenance) == {"task": "news"}


def test_only_tensors_that_lost_entries_lose_their_support_digest() -> None:
    prints = {n: Fingerprint(sample="0" * 16, support="1" * 16) for n in ("a", "b", "c")}
    delta = SparseDelta(
        tensors={
            "a": _add("a", [0, 1], [9.0, 8.0]),
            "b": _add("b", [0, 1], [7.0, 1.0]),
            "c": _add("c", [0], [0.5]),
        },
        extras={"head": np.ones(2, np.float32)},
        base=BaseIdentity(model_id="m", total_weights=6, tensors=prints),
        config={"num_labels": 2},
    )
    small = truncate(delta, 3)
    assert small.base == BaseIdentity(
        model_id="m",
        total_weights=6,
        tensors={"a": prints["a"], "b": Fingerprint(sample="0" * 16)},
    )
    assert list(small.extras) == ["head"]
    assert small.config == {"num_labels": 2}


def test_a_generated_support_keeps_its_seed_only_when_whole() -> None:
    whole = TensorDelta(
        name="a", shape=(4,), dtype="float32", mode="add", indices=np.array([1, 2]),
        values=np.array([5.0, 6.0], np.float32), seed=7,
    )  # fmt: skip
    delta = SparseDelta(tensors={"a": whole, "b": _add("b", [0], [1.0])})
    assert truncate(delta, 2).tensors["a"].seed == 7
    assert truncate(delta, 1).tensors["a"].seed is None


def test_order_is_needed_by_order() -> None:
    delta = SparseDelta(tensors={"w": _add("w", [0, 1], [1.0, 2.0])})
    with pytest.raises(DeltaError, match="tensor 'w' records no order of unmasking"):
        truncate(delta, 1, "order")


def test_an_unknown_criterion_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot truncate by 'size'"):
        truncate(SparseDelta(tensors={}), 1, "size")  # type: ignore[arg-type]


def test_set_counts_changes_not_weights() -> None:
    """A large weight that hardly moved gives way to a small one that moved far."""
    delta = SparseDelta(tensors={"w": _set([100.0, 1.0, 0.0], [100.5, -1.0, 0.25])})
    assert truncate(delta, 1).tensors["w"].indices.tolist() == [1]


def test_changes_to_or_from_non_finite_values_rank_first() -> None:
    inf, nan = float("inf"), float("nan")
    delta = SparseDelta(tensors={"w": _set([nan, 1.0, 2.0, inf], [nan, nan, 9.0, -inf])})
    assert truncate(delta, 2).tensors["w"].indices.tolist() == [1, 3]
    assert truncate(delta, 3).tensors["w"].indices.tolist() == [1, 2, 3]


def test_a_base_stands_in_for_base_values(checkpoint: Checkpoint) -> None:
    """With the base given, bare set tensors rank as if they carried their base values."""
    bare, carrying = _set_delta(checkpoint, carry=False), _set_delta(checkpoint, carry=True)
    with pytest.raises(DeltaError, match=r"set mode without base values.*give the base"):
        truncate(bare, 3)
    found = truncate(bare, 3, base=checkpoint)
    expected = truncate(carrying, 3)
    assert found.tensors["w"].indices.tolist() == expected.tensors["w"].indices.tolist()
    assert found.tensors["w"].base_values is None
    assert truncate(bare, 3, base=checkpoint.path).equals(found)


def test_another_base_is_refused(checkpoint: Checkpoint, other_checkpoint: Checkpoint) -> None:
    with pytest.raises(BaseMismatchError, match="tensor 'w' has other values"):
        truncate(_set_delta(checkpoint, carry=False), 3, base=other_checkpoint)


def _set_delta(checkpoint: Checkpoint, carry: bool) -> SparseDelta:
    indices = np.arange(0, 60, 7)
    base = checkpoint.gather("w", indices)
    values = base.view(np.float32) + np.linspace(-1, 2, len(indices), dtype=np.float32)
    tensor = TensorDelta(
        name="w",
        shape=checkpoint.tensors["w"].shape,
        dtype="float32",
        mode="set",
        indices=indices,
        values=values,
        base_values=base if carry else None,
    )
    return SparseDelta(tensors={"w": tensor}, base=identify(checkpoint, {"w": indices}))


def _add(name: str, indices: list[int], values: list[float]) -> TensorDelta:
    return TensorDelta(
        name=name,
        shape=(31,),
        dtype="float32",
        mode="add",
        indices=np.array(indices),
        values=np.array(values, np.float32),
    )


def _set(base: list[float], values: list[float]) -> TensorDelta:
    return TensorDelta(
        name="w",
        shape=(len(values),),
        dtype="float32",
        mode="set",
        indices=np.arange(len(values)),
        values=np.array(values, np.float32),
        base_values=np.array(base, np.float32),
    )
