"""Laws of what an entry becomes, against a loop over single entries."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from deltakit.delta import TensorDelta
from deltakit.dtypes import DTYPES, Array
from deltakit.errors import DeltaError
from deltakit.merging.arithmetic import Contribution, cast, merged_words, union_between

FLOATS = ["float64", "float32", "float16", "bfloat16"]


def tensor(
    dtype: str, mode: Any, indices: list[int], values: Array, base_values: Any = None
) -> TensorDelta:
    return TensorDelta(
        name="t",
        shape=(100,),
        dtype=dtype,
        mode=mode,
        indices=np.array(indices, np.int64),
        values=values,
        base_values=base_values,
    )


def adds(dtype: str, rng: np.random.Generator, count: int) -> TensorDelta:
    indices = sorted(rng.choice(100, count, replace=False).tolist())
    return tensor(dtype, "add", indices, rng.standard_normal(count).astype("f8"))


@pytest.mark.parametrize("dtype", FLOATS)
def test_weighted_sums_equal_a_loop_over_entries(dtype: str) -> None:
    """round(base + (0 + w1 * v1 + w2 * v2 + w3 * v3)), each step rounded, never fused."""
    rng = np.random.default_rng(5)
    kind = DTYPES[dtype]
    base = rng.standard_normal(100).astype(kind.numpy)
    parts = [Contribution(w, adds(dtype, rng, 60)) for w in (0.3, -1.7, 1.0)]
    at = union_between(parts, 0, 100)
    found = merged_words(base.view(kind.words)[at], at, parts, kind)
    scalar: Any = np.float64 if dtype == "float64" else np.float32
    for index, word in zip(at, found, strict=True):
        total = scalar(0)
        for part in parts:
            place = np.flatnonzero(part.delta.indices == index)
            if place.size:
                total = scalar(total + scalar(part.weight) * scalar(part.delta.values[place[0]]))
        expected = np.array(scalar(base[index]) + total).astype(kind.numpy)
        assert word == expected.view(kind.words)


@pytest.mark.parametrize("dtype", [*FLOATS, "float8_e4m3fn", "int8", "bool"])
def test_set_alone_writes_any_bits(dtype: str) -> None:
    """NaN payloads and negative zeros too; bool holds 0 and 1 only."""
    kind = DTYPES[dtype]
    top = 1 if dtype == "bool" else np.iinfo(kind.words).max
    bits = np.array([0, 1, top, top // 2, top // 2 + 1], kind.words)
    one = tensor(dtype, "set", [0, 3, 4, 7, 99], bits)
    base = np.zeros(5, kind.words)
    assert np.array_equal(merged_words(base, one.indices, [Contribution(1, one)], kind), bits)
    assert not base.any()


def test_set_deltas_agree_or_are_refused() -> None:
    kind = DTYPES["float32"]
    one = tensor("float32", "set", [1, 2], np.array([5, 6], np.float32))
    same = tensor("float32", "set", [2, 3], np.array([6, 7], np.float32))
    other = tensor("float32", "set", [2, 3], np.array([8, 7], np.float32))
    at, base = np.arange(1, 4), np.zeros(3, np.uint32)
    parts = [Contribution(1, one), Contribution(1, same)]
    assert merged_words(base, at, parts, kind).view(np.float32).tolist() == [5, 6, 7]
    with pytest.raises(DeltaError, match=r"'t': 1 or more .* by two deltas \(such as index 2\)"):
        merged_words(base, at, [Contribution(1, one), Contribution(1, other)], kind)


def test_set_with_weights_moves_from_the_recorded_base() -> None:
    """w * (new - base) is added; recorded base bits come before the base at hand."""
    kind = DTYPES["float32"]
    new, recorded = np.array([4.0], np.float32), np.array([2.0], np.float32)
    base = np.array([3.0], np.float32).view(np.uint32)
    at = np.array([9])
    half = Contribution(0.5, tensor("float32", "set", [9], new))
    assert merged_words(base, at, [half], kind).view(np.float32).tolist() == [3.5]
    half = Contribution(0.5, tensor("float32", "set", [9], new, recorded))
    assert merged_words(base, at, [half], kind).view(np.float32).tolist() == [4.0]


def test_set_that_meets_add_is_a_sum_and_agreeing_sets_count_once() -> None:
    kind = DTYPES["bfloat16"]
    base = np.array([1.0, 1.0], ml_dtypes.bfloat16).view(np.uint16)
    new = np.array([3.0, 5.0], ml_dtypes.bfloat16)
    sets = Contribution(1, tensor("bfloat16", "set", [0, 1], new))
    add = Contribution(2, tensor("bfloat16", "add", [1], np.array([0.5])))
    at = np.array([0, 1])
    for parts in ([sets, add], [add, sets], [sets, add, sets]):
        found = merged_words(base, at, parts, kind).view(ml_dtypes.bfloat16)
        assert found.astype(float).tolist() == [3.0, 6.0]


def test_what_has_no_arithmetic_is_refused() -> None:
    base, at = np.zeros(1, np.uint8), np.array([0])
    half = Contribution(0.5, tensor("int8", "set", [0], np.array([1], np.int8)))
    with pytest.raises(DeltaError, match="'t' is int8, for which weights and sums are not defined"):
        merged_words(base, at, [half], DTYPES["int8"])
    nan = Contribution(0.5, tensor("float32", "set", [0], np.array([np.nan], np.float32)))
    with pytest.raises(DeltaError, match="the change at index 0 is not finite"):
        merged_words(np.zeros(1, np.uint32), at, [nan], DTYPES["float32"])


def test_windows_see_their_own_entries_only() -> None:
    """Merging piece by piece equals merging at once."""
    rng = np.random.default_rng(6)
    kind = DTYPES["float16"]
    parts = [Contribution(w, adds("float16", rng, 50)) for w in (1.0, 0.25)]
    base = rng.standard_normal(100).astype(np.float16).view(np.uint16)
    at = union_between(parts, 0, 100)
    whole = merged_words(base[at], at, parts, kind)
    pieces = []
    for start in range(0, 100, 7):
        some = union_between(parts, start, start + 7)
        pieces.append(merged_words(base[some], some, parts, kind))
    assert np.array_equal(np.concatenate(pieces), whole)
    assert merged_words(base[:0], at[:0], parts, kind).size == 0


def test_cast_rounds_to_nearest_even_and_overflows_to_infinity() -> None:
    words = np.array([1.00390625, 1.01171875, 1e39], np.float64).view(np.uint64)
    found = cast(words, DTYPES["float64"], DTYPES["bfloat16"]).view(ml_dtypes.bfloat16)
    assert found.astype(float).tolist() == [1.0, 1.015625, np.inf]
