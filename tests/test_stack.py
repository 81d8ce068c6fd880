"""Laws of stacking: the same bits as merging at once, one base, honest lineage, clear refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_factory import random_array, write_safetensors
from merge_reference import adding, only
from stack_reference import sparse

from deltakit.combine import METHODS
from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array, dtype_of
from deltakit.errors import BaseMismatchError, ConfigError, DeltaError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta import load, save
from deltakit.identity import identify
from deltakit.lineage import digest
from deltakit.merging.merge import merge
from deltakit.stacking import stack

KINDS: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def base_of(tmp_path: Path, kind: Any) -> tuple[Path, dict[str, Array]]:
    """A checkpoint with negative zeros and a NaN among its weights."""
    rng = np.random.default_rng(3)
    tensors = {"b": random_array(rng, (50,), kind), "w": random_array(rng, (40, 60), kind)}
    tensors["w"].reshape(-1)[::5] = -0.0
    tensors["w"][0, 1] = np.nan
    return write_safetensors(tmp_path / "base.safetensors", tensors), tensors


def three(tensors: dict[str, Array]) -> list[SparseDelta]:
    """Deltas that overlap; the last undoes the first in `b`."""
    rng = np.random.default_rng(4)
    ws = [adding("w", tensors["w"], rng, 900) for _ in range(3)]
    b = adding("b", tensors["b"], rng, 20)
    return [only(ws[0], b), only(ws[1]), only(ws[2], replace(b, values=-b.values))]


def setting(base: Array, name: str, at: Array, rng: np.random.Generator, keep: bool = True) -> Any:
    """A set delta of random weights, with the base's bits beside."""
    return TensorDelta(
        name=name,
        shape=base.shape,
        dtype=dtype_of(base).name,
        mode="set",
        indices=at,
        values=rng.standard_normal(len(at)).astype(base.dtype),
        base_values=base.reshape(-1)[at] if keep else None,
    )


def merged(base: Path, deltas: Any, **options: Any) -> bytes:
    out = base.with_name("merged.safetensors")
    merge(base, deltas, out, force=True, **options)
    return out.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [None, [0.3, -1.7, 1.0], [1.0, 0.0, 1.0]])
def test_stacking_linearly_then_merging_is_merging_at_once(
    tmp_path: Path, kind: str, weights: Any
) -> None:
    """Bit for bit, where sums are zero on a base of -0.0 too."""
    base, tensors = base_of(tmp_path, KINDS[kind])
    deltas = three(tensors)
    stacked = stack(deltas, "linear", weights)
    assert (stacked.tensors["b"].values == 0).all() == (weights != [0.3, -1.7, 1.0])
    assert merged(base, stacked) == merged(base, deltas, weights=weights)


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.5, 1, 2], [1, 1, -0.7]])
@pytest.mark.parametrize("keep", [True, False])
def test_set_tensors_stay_set_in_linear_stacks(
    tmp_path: Path, weights: list[float], keep: bool
) -> None:
    """Set alone, set that meets add, recorded base values or the base itself: the merged bits."""
    base, tensors = base_of(tmp_path, ml_dtypes.bfloat16)
    rng = np.random.default_rng(5)
    one = setting(tensors["b"], "b", np.arange(0, 20), rng, keep)
    other = setting(tensors["b"], "b", np.arange(20, 40), rng, keep)
    deltas = [only(one), only(other), only(adding("b", tensors["b"], rng, 30))]
    stacked = stack(deltas, "linear", weights, base=base)
    assert stacked.tensors["b"].mode == "set"
    assert merged(base, stacked) == merged(base, deltas, weights=weights)
    if keep:
        alone = stack(deltas[:2], "linear", weights[:2])
        assert merged(base, alone) == merged(base, deltas[:2], weights=weights[:2])
    with pytest.raises(DeltaError, match="'b' is in set mode and the base's value at index"):
        stack(deltas, "linear", weights)


@pytest.mark.parametrize("name", METHODS.names())
def test_merging_by_a_method_is_stacking_then_merging(tmp_path: Path, name: str) -> None:
    base, tensors = base_of(tmp_path, np.float32)
    deltas = three(tensors)
    options = {"collisions": "last"} if name == "disjoint" else {}
    out = tmp_path / "at-once.safetensors"
    report = merge(base, deltas, out, method=name, weights=[1, 0.5, 2], **options)
    assert out.read_bytes() == merged(base, stack(deltas, name, [1, 0.5, 2], **options))
    assert (report.method, report.weights, len(report.deltas)) == (name, (1, 0.5, 2), 3)
    assert out.read_bytes() != base.read_bytes()


def test_options_of_methods_need_a_method(tmp_path: Path) -> None:
    base, tensors = base_of(tmp_path, np.float32)
    with pytest.raises(ConfigError, match="density is an option of stacking methods"):
        merge(base, three(tensors), density=0.5)


def test_weights_by_pattern(tmp_path: Path) -> None:
    """The first pattern counts, "*" is for the rest, and merging takes them too."""
    base, tensors = base_of(tmp_path, np.float32)
    deltas = three(tensors)[:2]
    weights = [{"w*": 0.25, "[wx]": 9.0, "*": 3.0}, {"w": -1.0}]
    found = stack(deltas, "linear", weights)
    expected = stack(deltas, "linear", [0.25, -1.0]).tensors["w"]
    assert found.tensors["w"].equals(expected)
    assert np.array_equal(found.tensors["b"].values, 3 * deltas[0].tensors["b"].values)
    assert merged(base, deltas, weights=weights) == merged(base, found)
    unlisted = stack(deltas[:1], "linear", [{"w": 2.0}])
    assert np.array_equal(unlisted.tensors["b"].values, deltas[0].tensors["b"].values)


def test_set_entries_become_changes_to_the_base() -> None:
    base = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    rng = np.random.default_rng(0)
    delta = only(setting(base, "w", np.array([1, 3]), rng))
    found = stack([delta], "task-arithmetic", [2.0]).tensors["w"]
    new = delta.tensors["w"].values.view(np.float32)
    assert found.mode == "add"
    assert found.values.tolist() == (np.float32(2) * (new - base[[1, 3]])).tolist()


def test_missing_base_values_come_from_the_base(tmp_path: Path) -> None:
    path, tensors = base_of(tmp_path, ml_dtypes.bfloat16)
    at = np.arange(0, 40, 3)
    bare, full = (
        only(setting(tensors["b"], "b", at, np.random.default_rng(1), keep))
        for keep in (False, True)
    )
    with pytest.raises(DeltaError, match=r"'b' is in set mode without base values.*give the base"):
        stack([bare], "ties")
    found = stack([bare], "ties", density=1, base=path)
    assert found.tensors["b"].equals(stack([full], "ties", density=1).tensors["b"])


def test_float64_tensors_are_summed_in_float64() -> None:
    values = np.array([1.0, 1e-12])
    tensor = TensorDelta(
        name="w", shape=(2,), dtype="float64", mode="add", indices=np.arange(2), values=values
    )
    for name in ("linear", "task-arithmetic", "ties", "sce", "ram-plus"):
        options = {"density": 1.0} if name in ("ties", "sce") else {}
        options |= {"threshold": 0.0} if name == "ram-plus" else {}
        made = stack([only(tensor), only(tensor)], name, [0.5, 0.5], **options).tensors["w"]
        assert made.values.dtype == np.float64
        assert made.values[1] in (1e-12, 0.5e-12)


def test_zeros_are_dropped_and_empty_tensors_too() -> None:
    one = sparse({"a": [1.0, 2.0], "b": [3.0]})
    other = sparse({"a": [1.0, 1.0], "b": [3.0]})
    made = stack([one, other], "task-arithmetic", [1, -1])
    assert {n: t.indices.tolist() for n, t in made.tensors.items()} == {"a": [1]}
    assert stack([one, one], "task-arithmetic", [1, -1]).nnz == 0
    assert stack([SparseDelta(tensors={})], "ties").nnz == 0


def test_the_base_is_carried_and_checked(tmp_path: Path) -> None:
    path, tensors = base_of(tmp_path, np.float32)
    checkpoint = Checkpoint(path)
    deltas = [
        replace(d, base=identify(checkpoint, {n: t.indices for n, t in d.tensors.items()}))
        for d in three(tensors)
    ]
    made = stack(deltas, "ties")
    assert made.base is not None
    assert made.base.total_weights == checkpoint.total_weights
    samples = identify(checkpoint, {"b": None, "w": None}).tensors
    assert {n: p.sample for n, p in made.base.tensors.items()} == {
        n: p.sample for n, p in samples.items()
    }
    known = stack(deltas, "ties", base=path).base
    assert known == identify(checkpoint, {n: t.indices for n, t in made.tensors.items()})
    tensors["w"] = tensors["w"] + 1
    other = write_safetensors(tmp_path / "other.safetensors", tensors)
    with pytest.raises(BaseMismatchError, match="tensor 'w' has other values"):
        merge(other, made, tmp_path / "out.safetensors")
    with pytest.raises(BaseMismatchError, match=r"delta 0: .*tensor 'w' has other values"):
        stack(deltas, "ties", base=other)


def test_deltas_of_different_bases_are_refused(tmp_path: Path) -> None:
    path, tensors = base_of(tmp_path, np.float32)
    one = three(tensors)[1]
    tensors["w"] = tensors["w"] * 2
    other = write_safetensors(tmp_path / "other.safetensors", tensors)
    pair = [
        replace(one, base=identify(Checkpoint(p), {"w": one.tensors["w"].indices}))
        for p in (path, other)
    ]
    with pytest.raises(
        BaseMismatchError, match="delta 0 and delta 1 belong to different bases: tensor 'w' has"
    ):
        stack(pair)
    made = stack(pair, allow_base_mismatch=True)
    assert made.equals(replace(stack([one, one]), base=made.base, provenance=made.provenance))
    (note,) = made.provenance["notes"]
    assert "stacked all the same, as asked" in note


def test_extras_differ_until_a_head_is_chosen() -> None:
    one = sparse({"w": [1.0]}, extras={"head": np.ones(2)}, config={"num_labels": 2})
    other = sparse({"w": [1.0]}, extras={"head": np.zeros(3)}, config={"num_labels": 3})
    with pytest.raises(DeltaError, match=r"'head' differs between delta 0 and delta 1"):
        stack([one, other])
    made = stack([one, other], head=1, weights=[0.5, 0.5])
    assert made.extras["head"].tolist() == [0, 0, 0]
    assert made.config == {"num_labels": 3}
    assert made.provenance["head"] == 1
    assert made.provenance["notes"] == ["weights do not apply to extras, which are taken whole"]


def test_lineage_tells_everything(tmp_path: Path) -> None:
    one = sparse({"w": [1.0, 2.0]}, provenance={"task": "news", "loss": [3, 2], "lineage": [1]})
    other = sparse({"w": [1.0, -2.0]})
    save(one, tmp_path / "one.sdelta")
    made = stack([tmp_path / "one.sdelta", other], "magnitude", [0.5, {"w": 2}], density=1)
    assert dict(made.provenance) == {
        "operation": "stack",
        "method": "magnitude",
        "flavour": "paper",
        "options": {
            "scale": 1.0,
            "density": 1.0,
            "density_of": "entries",
            "rounding": "exact",
            "trim_scope": "global",
            "least": 0,
        },
        "sources": [
            {
                "name": "one.sdelta",
                "digest": digest(one),
                "weight": 0.5,
                "entries": 2,
                "provenance": {"task": "news", "lineage": [1]},
            },
            {"name": "delta 1", "digest": digest(other), "weight": {"w": 2.0}, "entries": 2},
        ],
    }
    save(made, tmp_path / "two.sdelta")
    assert load(tmp_path / "two.sdelta").equals(made)
    again = stack([made, other]).provenance["sources"][0]
    assert [s["digest"] for s in again["provenance"]["sources"]] == [digest(one), digest(other)]
    assert again["digest"] == digest(made)


def test_equal_stacks_have_equal_bytes(tmp_path: Path) -> None:
    _, tensors = base_of(tmp_path, np.float32)
    for name in ("x", "y"):
        save(stack(three(tensors), "dare-ties", seed=7), tmp_path / f"{name}.sdelta")
    assert (tmp_path / "x.sdelta").read_bytes() == (tmp_path / "y.sdelta").read_bytes()


def test_digests_see_every_part() -> None:
    delta = sparse({"w": [1.0, 2.0]}, extras={"head": np.ones(2, np.float32)})
    others = [
        sparse({"w": [1.0, 3.0]}, extras=delta.extras),
        sparse({"v": [1.0, 2.0]}, extras=delta.extras),
        sparse({"w": [[1.0, 2.0]]}, extras=delta.extras),
        sparse({"w": [1.0, 2.0]}, extras={"head": np.ones(2, np.float64)}),
        sparse({"w": [1.0, 2.0]}),
    ]
    assert len({digest(d) for d in [delta, *others]}) == 6
    assert digest(replace(delta, provenance={"a": 1})) == digest(delta)
    at, base = np.arange(2), np.zeros(4, np.float32)
    sets = [only(setting(base, "w", at, np.random.default_rng(0), keep)) for keep in (False, True)]
    assert digest(sets[0]) != digest(sets[1])


def test_progress_goes_over_tensors(tmp_path: Path) -> None:
    _, tensors = base_of(tmp_path, np.float32)
    for name in ("linear", "ties"):
        seen: list[tuple[int, int]] = []
        stack(three(tensors), name, progress=lambda done, total: seen.append((done, total)))  # noqa: B023
        assert seen == [(1, 2), (2, 2)]


def test_what_does_not_fit_is_refused() -> None:
    delta = sparse({"w": [1.0, 2.0]})
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([delta, sparse({"w": [[1.0, 2.0]]})], {}, r"shape is \(2,\) in delta 0 and \(1, 2\) in"),
        ([delta, _typed("float16")], {}, "dtype is float32 in delta 0 and float16 in delta 1"),
        ([delta], {"weights": [1, 2]}, "2 weights for 1 deltas; give one for each"),
        ([delta], {"weights": [float("inf")]}, "weight inf is not finite"),
        ([delta], {"weights": ["x"]}, "weight 'x' is no number"),
        ([delta], {"weights": [{"v.*": 1}]}, "the weight for 'v.*' matches no tensor"),
        ([delta], {"weights": [3e38], "method": "task-arithmetic"}, "is not finite"),
        ([], {}, "no delta"),
    ]
    for deltas, options, told in cases:
        with pytest.raises((ConfigError, DeltaError), match=told.replace("v.*", r"v\.\*")):
            stack(deltas, **options)


def test_changes_without_arithmetic_are_refused() -> None:
    rng = np.random.default_rng(0)
    eight = setting(np.zeros(4, np.float32).astype(ml_dtypes.float8_e4m3fn), "w", np.arange(2), rng)
    with pytest.raises(DeltaError, match="'w' is float8_e4m3fn, for which sums are not defined"):
        stack([only(eight)], "ties")
    assert stack([only(eight)]).tensors["w"].equals(eight)
    broken = setting(np.full(4, np.nan, np.float32), "w", np.arange(2), rng)
    with pytest.raises(DeltaError, match="'w': the change at index 0 is not finite"):
        stack([only(broken)], "ties")


def _typed(dtype: str) -> SparseDelta:
    tensor = TensorDelta(
        name="w",
        shape=(2,),
        dtype=dtype,
        mode="add",
        indices=np.arange(2),
        values=np.ones(2, np.float32),
    )
    return only(tensor)
