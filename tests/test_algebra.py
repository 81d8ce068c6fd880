"""Laws of deltas of deltas, against dense arrays and against merging itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_factory import random_array, read_safetensors, write_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_reference import only

import deltakit as dk
from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import DTYPES, Array
from deltakit.errors import BaseMismatchError, ConfigError, CoordinateError, DeltaError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.seeded import seeded_support
from deltakit.identity import check_base, identify

NAMES = ["a.0.w", "a.1.w", "b"]


def delta_on(
    rng: np.random.Generator, dtype: str = "float32", whole: bool = False, numel: int = 30
) -> SparseDelta:
    """Add entries on some of three tensors of `numel` elements; `whole`: small whole values."""
    tensors = []
    for name in NAMES:
        indices = np.flatnonzero(rng.random(numel) < rng.choice([0.0, 0.2, 0.6]))
        values = rng.integers(1, 9, len(indices)) if whole else rng.standard_normal(len(indices))
        if indices.size:
            tensors.append(add_tensor(name, indices, values, numel, dtype))
    return only(*tensors)


def add_tensor(
    name: str, indices: Any, values: Any, numel: int = 30, dtype: str = "float32", **more: Any
) -> TensorDelta:
    return TensorDelta(
        name=name,
        shape=(numel,),
        dtype=dtype,
        mode="add",
        indices=np.asarray(indices),
        values=np.asarray(values, np.float64),
        **more,
    )


def dense(delta: SparseDelta, numel: int = 30) -> dict[str, Array]:
    """The changes of an add delta as whole arrays."""
    made = {name: np.zeros(numel, np.float32) for name in NAMES}
    for name, tensor in delta.tensors.items():
        made[name] = made[name].astype(tensor.values.dtype)
        made[name][tensor.indices] = tensor.values
    return made


def support(delta: SparseDelta) -> set[tuple[str, int]]:
    return {(n, int(i)) for n, t in delta.tensors.items() for i in t.indices}


def same_tensors(one: SparseDelta, other: SparseDelta) -> bool:
    return list(one.tensors) == list(other.tensors) and all(
        tensor.equals(other.tensors[name]) for name, tensor in one.tensors.items()
    )


seeds = st.integers(0, 2**32)


@settings(max_examples=40)
@given(seed=seeds, weight=st.floats(-4, 4), dtype=st.sampled_from(["float32", "float64"]))
def test_sums_and_multiples_equal_dense_arithmetic(seed: int, weight: float, dtype: str) -> None:
    """Also in their supports: the union, and the delta's own."""
    rng = np.random.default_rng(seed)
    one, other = delta_on(rng, dtype), delta_on(rng, dtype)
    a, b = dense(one), dense(other)
    total, times, less = dk.add(one, other), dk.scale(one, weight), dk.subtract(one, other)
    assert support(total) == support(one) | support(other)
    assert support(times) == support(one)
    for name in NAMES:
        scalar = a[name].dtype.type
        assert np.array_equal(dense(total)[name], a[name] + b[name])
        assert np.array_equal(dense(times)[name], scalar(weight) * a[name])
        assert np.array_equal(dense(less)[name], a[name] - b[name])


@settings(max_examples=40)
@given(seed=seeds)
def test_parts_are_set_algebra(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other, third = (delta_on(rng) for _ in range(3))
    common = dk.intersect(one, other, third)
    assert support(common) == support(one) & support(other) & support(third)
    assert same_tensors(common, dk.restrict(dk.restrict(one, support=other), support=third))
    for name, tensor in common.tensors.items():
        assert np.array_equal(tensor.values, dense(one)[name][tensor.indices])
    assert all(tensor.nnz for tensor in common.tensors.values())


@settings(max_examples=40)
@given(seed=seeds)
def test_disjoint_sums_commute_and_subtracting_undoes_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, rest = delta_on(rng), delta_on(rng)
    kept = {
        name: tensor.take(~np.isin(tensor.indices, one.tensors[name].indices))
        for name, tensor in rest.tensors.items()
        if name in one.tensors
    }
    other = only(*(tensor for tensor in kept.values() if tensor.nnz))
    assert same_tensors(dk.add(one, other), dk.add(other, one))
    assert same_tensors(dk.subtract(dk.add(one, other), other), one)


@settings(max_examples=40)
@given(seed=seeds)
def test_subtracting_undoes_sums_that_float32_holds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = delta_on(rng, whole=True), delta_on(rng, whole=True)
    assert same_tensors(dk.subtract(dk.add(one, other), other), one)
    assert dk.subtract(one, one).nnz == 0


@settings(max_examples=15)
@given(seed=seeds, dtype=st.sampled_from(["float32", "bfloat16", "float16", "float64"]))
def test_merging_the_result_equals_merging_the_parts(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: str
) -> None:
    """Bit for bit, for add and for set tensors, alone and together."""
    folder, rng = tmp_path_factory.mktemp("m"), np.random.default_rng(seed)
    kind = DTYPES[dtype]
    sides = [{n: random_array(rng, (30,), kind.numpy) for n in NAMES} for _ in range(2)]
    base = write_safetensors(folder / "base.safetensors", sides[0])
    for name in NAMES:  # a neighbouring value: base + difference gives it back
        words = sides[0][name].view(kind.words)
        sides[1][name] = np.where(rng.random(30) < 0.3, words + 1, words).view(kind.numpy)
    tuned = write_safetensors(folder / "tuned.safetensors", sides[1])
    one, other, bits = delta_on(rng, dtype), delta_on(rng, dtype), dk.diff(base, tuned)

    def merged(name: str, deltas: Any, weights: Any = None) -> dict[str, Any]:
        dk.merge(base, deltas, folder / f"{name}.safetensors", weights=weights, force=True)
        return read_safetensors(folder / f"{name}.safetensors")

    for pair in ((one, other), (one, bits), (bits, one)):
        assert merged("x", dk.add(*pair)) == merged("y", list(pair))
        assert merged("x", dk.subtract(*pair)) == merged("y", list(pair), [1, -1])
    assert merged("x", dk.scale(bits, 0.3)) == merged("y", bits, [0.3])
    assert merged("x", dk.rebase(one, base, "set")) == merged("y", one)
    assert merged("x", dk.rebase(bits, base, "add")) == merged("y", bits)


def test_set_tensors_join_where_they_agree() -> None:
    def bits(indices: list[int], values: list[float], keep: bool = True) -> SparseDelta:
        base = np.arange(30, dtype=np.float32)[indices] if keep else None
        found = np.array(values, np.float32)
        return only(
            TensorDelta(
                name="b",
                shape=(30,),
                dtype="float32",
                mode="set",
                indices=np.array(indices),
                values=found,
                base_values=base,
            )
        )

    joined = dk.add(bits([1, 5], [np.nan, 2]), bits([5, 7], [2, -0.0])).tensors["b"]
    assert joined.mode == "set"
    assert joined.indices.tolist() == [1, 5, 7]
    assert joined.values.tobytes() == np.array([np.nan, 2, -0.0], np.float32).tobytes()
    assert joined.base_values is not None
    assert joined.base_values.view(np.float32).tolist() == [1, 5, 7]
    half = dk.add(bits([1], [3]), bits([2], [4], keep=False)).tensors["b"]
    assert half.base_values is None
    with pytest.raises(DeltaError, match=r"'b': 1 entries are set to .* \(such as index 5\)"):
        dk.add(bits([5], [2]), bits([5], [3]))
    with pytest.raises(DeltaError, match="'b' is in set mode and carries no base values"):
        dk.scale(bits([5], [2], keep=False), 0.5)
    with pytest.raises(
        DeltaError, match=r"'b' is in set mode in one delta .* do not give its bits"
    ):
        dk.add(bits([5], [np.inf]), only(add_tensor("b", [1], [1])))


def test_scaling_by_one_is_the_delta_and_a_seed_stays_with_its_support() -> None:
    indices = seeded_support(7, "b", 30, 6)
    delta = only(add_tensor("b", indices, np.ones(6), seed=7, order=np.arange(6)))
    assert dk.scale(delta, 1) is delta
    half = dk.scale(delta, 0.5).tensors["b"]
    assert (half.seed, half.values.tolist()) == (7, [0.5] * 6)
    assert half.order is not None
    assert half.order.tolist() == list(range(6))
    assert dk.add(delta, delta).tensors["b"].seed == 7
    other = only(add_tensor("b", np.setdiff1d(np.arange(30), indices)[:2], [1, 1]))
    both = dk.add(delta, other).tensors["b"]
    assert (both.seed, both.order) == (None, None)
    assert dk.restrict(delta, support=other).nnz == 0
    assert dk.intersect(delta, delta).tensors["b"].equals(delta.tensors["b"])
    with pytest.raises(ConfigError, match="weight nan is not finite"):
        dk.scale(delta, float("nan"))
    with pytest.raises(DeltaError, match=r"value inf at index .* is not finite"):
        dk.scale(dk.scale(delta, 1e38), 1e38)


def test_restricting_to_tensors_takes_their_extras_along() -> None:
    array = np.zeros(2, np.float32)
    delta = only(
        add_tensor("a.0.w", [1], [1]),
        add_tensor("a.1.w", [2], [2]),
        extras={"head.0": array, "b": array},
        config={"num_labels": 2},
    )
    first = dk.restrict(delta, "0")
    assert (list(first.tensors), list(first.extras)) == (["a.0.w"], ["head.0"])
    assert first.config == {"num_labels": 2}
    inner = dk.restrict(delta, ["a.*", "a.1"])
    assert (list(inner.tensors), list(inner.extras), inner.config) == (["a.0.w", "a.1.w"], [], {})
    with pytest.raises(
        ConfigError, match=r"^pattern 'a.2' matches no tensor; nearest: a\.\d\.w.*w$"
    ):
        dk.restrict(delta, ["a.2"])


def test_extras_and_lineage_follow_the_deltas(tmp_path: Path) -> None:
    one = only(add_tensor("b", [1], [1]), extras={"h": np.ones(2)}, provenance={"task": "x"})
    other = only(add_tensor("b", [2], [1]), extras={"h": np.ones(2)}, provenance={"task": "y"})
    total = dk.add(dk.add(one, other), one)
    assert list(total.extras) == ["h"]
    tasks = [{"task": "x"}, {"task": "y"}, {"task": "x"}]
    assert total.provenance == {"operation": "add", "of": tasks}
    half = dk.scale(total, 0.5)
    step = {"operation": "scale", "weight": 0.5, "from": 2}
    assert half.provenance == {**total.provenance, "lineage": [step]}
    dk.save(dk.intersect(half, one), tmp_path / "d.sdelta")
    last = dk.load(tmp_path / "d.sdelta").provenance["lineage"][-1]
    assert last == {"operation": "intersect", "with": [{"task": "x"}], "from": 2}
    less = dk.subtract(one, other)
    assert less.provenance == {"operation": "subtract", "of": tasks[:2]}
    assert list(less.extras) == ["h"]
    moved = only(extras={"h": np.zeros(2)})
    with pytest.raises(DeltaError, match="extra 'h' differs between delta 0 and delta 1"):
        dk.add(one, moved)


def test_bases_are_checked_and_carried(
    checkpoint: Checkpoint, other_checkpoint: Checkpoint, delta_file: Path
) -> None:
    """A digest of a support stays where the support does; the rest is checked by the sample."""
    one = dk.load(delta_file)
    part = dk.restrict(one, "b")
    assert one.base is not None
    assert part.base is not None
    assert part.base.tensors == {"b": one.base.tensors["b"]}
    some = only(one.tensors["w"].take(slice(0, 50)), base=one.base)
    less = dk.intersect(one, some)
    assert less.base is not None
    assert (less.base.model_id, less.base.total_weights) == ("org/base", 620)
    assert less.base.tensors["w"].support is None
    total = dk.add(part, less)
    assert check_base(total, checkpoint) == []
    assert total.base is not None
    assert total.base.tensors["b"].support == one.base.tensors["b"].support
    foreign = only(one.tensors["w"], base=identify(other_checkpoint, {"w": None}))
    for combine in (dk.add, dk.subtract, dk.intersect):
        with pytest.raises(BaseMismatchError, match="different bases: tensor 'w' has other base"):
            combine(one, foreign)
    halved = only(add_tensor("b", [1], [1], 20, "float16"))
    with pytest.raises(BaseMismatchError, match="'b' is float32 trained as float32 in one delta"):
        dk.add(one, halved)


def test_rebasing_says_which_tensors_stay_set(tmp_path: Path) -> None:
    sides = {
        "a": (np.array([1.0, 2.0], np.float32), np.array([1.5, 2.0], np.float32)),
        "b": (np.array([1e30], np.float32), np.array([1.0], np.float32)),
        "c": (np.array([1], np.int8), np.array([2], np.int8)),
        "d": (np.array([1], ml_dtypes.bfloat16), np.array([np.inf], ml_dtypes.bfloat16)),
    }
    base = write_safetensors(tmp_path / "base.safetensors", {n: s[0] for n, s in sides.items()})
    tuned = write_safetensors(tmp_path / "tuned.safetensors", {n: s[1] for n, s in sides.items()})
    bare = dk.diff(base, tuned, keep_base=False)
    added = dk.rebase(bare, base, "add")
    assert {n: t.mode for n, t in added.tensors.items()} == {
        "a": "add",
        "b": "set",
        "c": "set",
        "d": "set",
    }
    step = {"operation": "rebase", "mode": "add", "stayed_set": ["b", "c", "d"]}
    assert added.provenance["lineage"] == [step]
    back = dk.rebase(added, base, "set")
    assert same_tensors(back, dk.diff(base, tuned))
    assert same_tensors(dk.rebase(added, Checkpoint(base), "set", keep_base=False), bare)
    assert back.base == bare.base
    with pytest.raises(BaseMismatchError, match="is not the base of the delta"):
        dk.rebase(bare, tuned, "add")
    with pytest.raises(ConfigError, match="mode 'both': mode is add or set"):
        dk.rebase(bare, base, "both")  # type: ignore[arg-type]
    with pytest.raises(CoordinateError, match=r"'z', which .* lacks"):
        dk.rebase(only(add_tensor("z", [0], [1])), base, "set")
