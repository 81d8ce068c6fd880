"""Laws of merging into one file: entries by a naive dense reference, all other bytes untouched."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_factory import random_array, read_safetensors, write_safetensors, write_sharded

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array, dtype_of
from deltakit.errors import (
    BaseMismatchError,
    ConfigError,
    CoordinateError,
    DeltaError,
    MissingFileError,
    OutputError,
    OutputExistsError,
)
from deltakit.formats import sdelta
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import identify
from deltakit.merge import merge

KINDS: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def adding(
    name: str, base: Array, rng: np.random.Generator, count: int, trained: str = ""
) -> TensorDelta:
    """An add delta of `count` random entries on the tensor `base`."""
    indices = np.sort(rng.choice(base.size, count, replace=False))
    return TensorDelta(
        name=name,
        shape=base.shape,
        dtype=dtype_of(base).name,
        mode="add",
        indices=indices,
        values=rng.standard_normal(count),
        trained_dtype=trained,
    )


def only(*tensors: TensorDelta, **more: Any) -> SparseDelta:
    return SparseDelta(tensors={t.name: t for t in tensors}, **more)


def dense_reference(base: Array, deltas: list[TensorDelta], weights: list[float]) -> Array:
    """The merged tensor by a naive dense loop; words where no delta has an entry are the base's."""
    compute = np.float64 if base.dtype == np.float64 else np.float32
    total, touched = np.zeros(base.size, compute), np.zeros(base.size, bool)
    for delta, weight in zip(deltas, weights, strict=True):
        dense = np.zeros(base.size, compute)
        dense[delta.indices] = delta.values
        scaled = compute(weight) * dense
        total = total + scaled
        touched[delta.indices] = True
    moved = (base.reshape(-1).astype(compute) + total).astype(base.dtype)
    return np.where(touched, moved, base.reshape(-1)).reshape(base.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [[1.0], [0.5, -0.3], [1.0, 1.0, 0.1]])
def test_entries_by_the_reference_and_all_else_untouched(
    tmp_path: Path, kind: str, weights: list[float]
) -> None:
    """The header too is the base's byte for byte; the tensor spans several windows."""
    rng = np.random.default_rng(7)
    tensors = {
        "big": random_array(rng, (700, 900), KINDS[kind]),
        "ids": np.arange(12, dtype=np.int64),
        "scalar": random_array(rng, (), KINDS[kind]),
    }
    path = write_safetensors(tmp_path / "base.safetensors", tensors, {"format": "pt"})
    before = path.read_bytes()
    bigs = [adding("big", tensors["big"], rng, 4000) for _ in weights]
    deltas = [only(big, adding("scalar", tensors["scalar"], rng, 1)) for big in bigs]
    report = merge(path, deltas, tmp_path / "out.safetensors", weights=weights)
    merged = (tmp_path / "out.safetensors").read_bytes()
    expected = dict(tensors)
    for name in ("big", "scalar"):
        parts = [delta.tensors[name] for delta in deltas]
        expected[name] = dense_reference(tensors[name], parts, weights)
    reference = write_safetensors(tmp_path / "reference.safetensors", expected, {"format": "pt"})
    assert merged == reference.read_bytes()
    assert path.read_bytes() == before
    union = len(np.unique(np.concatenate([big.indices for big in bigs])))
    assert (report.entries, report.tensors, report.bytes) == (union + 1, 2, len(before))
    assert json.loads(json.dumps(report.as_dict()))["weights"] == weights


def test_unaligned_bodies_merge_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    tensors = {"odd": np.zeros(3, np.int8), "w": random_array(rng, (50,), np.float32)}
    path = write_safetensors(tmp_path / "base.safetensors", tensors, pad=False)
    delta = adding("w", tensors["w"], rng, 9)
    merge(path, only(delta), tmp_path / "out.safetensors")
    merged = read_safetensors(tmp_path / "out.safetensors")
    assert merged["w"][2] == dense_reference(tensors["w"], [delta], [1.0]).tobytes()
    assert merged["odd"][2] == bytes(3)


def test_merging_without_touching_anything_copies(tmp_path: Path) -> None:
    """An empty delta gives the base's bytes; so does one whose tensors have no entries."""
    rng = np.random.default_rng(9)
    array = random_array(rng, (5, 5), np.float32)
    path = write_safetensors(tmp_path / "base.safetensors", {"w": array})
    for number, delta in enumerate([only(), only(adding("w", array, rng, 0))]):
        out = tmp_path / f"out{number}.safetensors"
        assert merge(path, delta, out).entries == 0
        assert out.read_bytes() == path.read_bytes()


def test_trained_dtype_reproduces_the_trained_bits(tmp_path: Path) -> None:
    """A float32 base is cast first, everywhere; plain merging says that it may differ."""
    rng = np.random.default_rng(10)
    bf16 = ml_dtypes.bfloat16
    tensors = {
        "w": random_array(rng, (300, 20), np.float32),
        "frozen": random_array(rng, (31,), np.float32),
        "ids": np.arange(5, dtype=np.int64),
    }
    path = write_safetensors(tmp_path / "base.safetensors", tensors)
    delta = adding("w", tensors["w"], rng, 500, trained="bfloat16")
    identity = identify(Checkpoint(path), {"w": delta.indices}, {"w": "bfloat16"})
    out = tmp_path / "out.safetensors"
    report = merge(path, only(delta, base=identity), out, dtype="trained")
    assert report.notes == ()
    trained = tensors["w"].astype(bf16).reshape(-1)  # what a bfloat16 training run ends with
    trained[delta.indices] = (trained[delta.indices].astype(np.float32) + delta.values).astype(bf16)
    merged = read_safetensors(out)
    assert merged["w"] == ("BF16", [300, 20], trained.tobytes())
    assert merged["frozen"][2] == tensors["frozen"].astype(bf16).tobytes()
    assert merged["ids"] == ("I64", [5], tensors["ids"].tobytes())
    (note,) = merge(path, only(delta, base=identity), out, force=True).notes
    assert "'w' was trained in bfloat16 and is merged in float32" in note


def test_dtype_converts_after_merging(tmp_path: Path) -> None:
    """Merged in the base's dtype, then cast: extras too, integers never."""
    rng = np.random.default_rng(11)
    tensors = {"w": random_array(rng, (40,), np.float32), "n": np.arange(3, dtype=np.int32)}
    path = write_safetensors(tmp_path / "base.safetensors", tensors)
    delta = adding("w", tensors["w"], rng, 8)
    head = random_array(rng, (2, 3), np.float32)
    out = tmp_path / "out.safetensors"
    merge(path, only(delta, extras={"head": head}), out, dtype="float16")
    merged = read_safetensors(out)
    expected = dense_reference(tensors["w"], [delta], [1.0]).astype(np.float16)
    assert merged["w"] == ("F16", [40], expected.tobytes())
    assert merged["head"] == ("F16", [2, 3], head.astype(np.float16).tobytes())
    assert merged["n"] == ("I32", [3], tensors["n"].tobytes())
    with pytest.raises(ConfigError, match="dtype 'int8' is not one of: trained, float64"):
        merge(path, only(delta), out, dtype="int8", force=True)


def test_trained_in_two_dtypes(tmp_path: Path) -> None:
    """By two deltas on one tensor: refused. On two tensors: the others keep their own."""
    rng = np.random.default_rng(12)
    tensors = {name: random_array(rng, (9,), np.float32) for name in "abc"}
    path = write_safetensors(tmp_path / "base.safetensors", tensors)
    half = only(adding("a", tensors["a"], rng, 2, "float16"))
    brain = adding("a", tensors["a"], rng, 2, "bfloat16")
    out = tmp_path / "out.safetensors"
    with pytest.raises(ConfigError, match="'a' was trained in float16 and in bfloat16"):
        merge(path, [half, only(brain)], out, dtype="trained")
    brain = adding("b", tensors["b"], rng, 2, "bfloat16")
    report = merge(path, [half, only(brain)], out, dtype="trained")
    assert "trained in several dtypes, float16 (such as 'a'), bfloat16" in report.notes[-1]
    assert [read_safetensors(out)[name][0] for name in "abc"] == ["F16", "BF16", "F32"]


def test_extras_are_appended_and_replaced_whole(tmp_path: Path) -> None:
    """Bits as they are; a new dtype moves the tensor so that every tensor stays aligned."""
    rng = np.random.default_rng(13)
    tensors = {
        "w": random_array(rng, (7,), ml_dtypes.bfloat16),
        "norm": random_array(rng, (5,), ml_dtypes.bfloat16),
    }
    path = write_safetensors(tmp_path / "base.safetensors", tensors, {"format": "pt"})
    extras = {
        "norm": random_array(rng, (5,), np.float32),
        "score": random_array(rng, (3, 2), np.float32),
        "count": np.array(7, np.int64),
    }
    out = tmp_path / "out.safetensors"
    delta = only(adding("w", tensors["w"], rng, 3), extras=extras)
    report = merge(path, delta, out, weights=[0.5])
    assert report.extras == ("count", "norm", "score")
    assert "weights do not apply to extras" in report.notes[-1]
    merged = read_safetensors(out)
    for name, array in extras.items():
        assert merged[name] == (dtype_of(array).code, list(array.shape), array.tobytes())
    assert merged["w"][2] == dense_reference(tensors["w"], [delta.tensors["w"]], [0.5]).tobytes()
    checkpoint = Checkpoint(out)
    assert checkpoint.shards["out.safetensors"].header.metadata == {"format": "pt"}
    for info in checkpoint.tensors.values():
        assert info.offset % info.kind.itemsize == 0


def test_extras_that_differ_need_a_head(tmp_path: Path) -> None:
    array = np.zeros(4, np.float32)
    path = write_safetensors(tmp_path / "base.safetensors", {"w": array})
    files = []
    for number in range(2):
        head = np.full((2, 2), number, np.float32)
        delta = only(extras={"head": head, "same": array}, config={"num_labels": 2})
        files.append(tmp_path / f"d{number}.sdelta")
        sdelta.save(delta, files[-1])
    out = tmp_path / "out.safetensors"
    with pytest.raises(DeltaError, match=r"extra 'head' differs between .*d0.* and .*d1.*--head"):
        merge(path, files, out)
    for choice in (1, files[1], str(files[1]), "1"):
        merge(path, files, out, head=choice, force=True)
        assert read_safetensors(out)["head"][2] == np.ones((2, 2), np.float32).tobytes()
    with pytest.raises(ConfigError, match="head 2 is out of range: 2 deltas"):
        merge(path, files, out, head=2, force=True)
    with pytest.raises(ConfigError, match=r"head 'x' is none of the deltas; they are: .*d0.sdelta"):
        merge(path, files, out, head="x", force=True)


def test_an_extra_and_entries_of_one_tensor_are_refused(tmp_path: Path) -> None:
    array = np.zeros(4, np.float32)
    path = write_safetensors(tmp_path / "base.safetensors", {"w": array})
    entries = only(adding("w", array, np.random.default_rng(0), 1))
    with pytest.raises(DeltaError, match="'w' is a whole extra in one delta and has single entr"):
        merge(path, [only(extras={"w": array}), entries], tmp_path / "out.safetensors")


def test_every_delta_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(14)
    array = random_array(rng, (60, 60), np.float32)
    path = write_safetensors(tmp_path / "base.safetensors", {"layer.w": array})
    other = write_safetensors(tmp_path / "other.safetensors", {"layer.w": array + 1})
    tensor = adding("layer.w", array, rng, 5)
    good = only(tensor, base=identify(Checkpoint(path), {"layer.w": tensor.indices}))
    bad = only(tensor, base=identify(Checkpoint(other), {"layer.w": tensor.indices}))
    out = tmp_path / "out.safetensors"
    with pytest.raises(BaseMismatchError, match=r"delta 1: .*'layer.w' has other values"):
        merge(path, [good, bad], out)
    unknown = only(replace(tensor, name="layer.weight"))
    with pytest.raises(CoordinateError, match=r"delta 1: .*'layer.weight'.*nearest: layer.w"):
        merge(path, [good, unknown], out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "other.safetensors"]
    report = merge(path, [good, bad], out, allow_base_mismatch=True)
    assert report.base_mismatch_allowed
    assert "used all the same, as asked" in report.notes[0]


def test_overflow_is_said(tmp_path: Path) -> None:
    base = np.full(4, 60000, np.float16)
    path = write_safetensors(tmp_path / "base.safetensors", {"w": base})
    big = TensorDelta(
        name="w",
        shape=(4,),
        dtype="float16",
        mode="add",
        indices=np.array([0, 2]),
        values=np.array([6000.0, 1.0]),
    )
    report = merge(path, only(big), tmp_path / "out.safetensors")
    assert "tensor 'w': 1 entries that were finite are infinite or NaN" in report.notes[-1]


def test_dry_run_says_what_would_happen_and_writes_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(15)
    array = random_array(rng, (500, 60), np.float32)
    path = write_safetensors(tmp_path / "base.safetensors", {"w": array})
    delta = only(adding("w", array, rng, 40), extras={"head": np.zeros((2, 2), np.float32)})
    out = tmp_path / "out.safetensors"
    told = merge(path, delta, out, dry_run=True)
    assert not out.exists()
    assert told.dry_run
    done = merge(path, delta, out)
    assert (done.bytes, told.bytes) == (out.stat().st_size, out.stat().st_size)
    assert replace(told, dry_run=False) == done
    with pytest.raises(OutputExistsError):
        merge(path, delta, out, dry_run=True)


def test_progress_counts_every_byte_of_the_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(16)
    array = random_array(rng, (2000, 300), np.float32)
    path = write_safetensors(tmp_path / "b.safetensors", {"w": array, "z": array[:9].copy()})
    seen: list[tuple[int, int]] = []
    out = tmp_path / "out.safetensors"
    merge(path, only(adding("w", array, rng, 4)), out, progress=lambda *at: seen.append(at))
    assert seen[-1] == (out.stat().st_size, out.stat().st_size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_default_name_is_made_of_base_and_delta(tmp_path: Path) -> None:
    array = np.zeros(4, np.float32)
    path = write_safetensors(tmp_path / "base.safetensors", {"w": array})
    run = tmp_path / "RUN"
    run.mkdir()
    sdelta.save(only(), run / "budget-25.sdelta")
    assert merge(path, run / "budget-25.sdelta").output == str(run / "base-budget-25.safetensors")
    with pytest.raises(OutputExistsError, match=r"base-budget-25.safetensors exists; give another"):
        merge(path, run / "budget-25.sdelta")
    several = merge(path, [run / "budget-25.sdelta"] * 2)
    assert several.output == str(run / "base-merged.safetensors")
    assert merge(path, only()).output == str(tmp_path / "base-merged.safetensors")


def test_inputs_are_never_overwritten(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "base.safetensors", {"w": np.zeros(4, np.float32)})
    file = tmp_path / "d.sdelta"
    sdelta.save(only(), file)
    for out in (path, file, tmp_path / "x" / ".." / "base.safetensors"):
        with pytest.raises(OutputError, match="is an input of the merge"):
            merge(path, file, out, force=True)
    with pytest.raises(OutputError, match="holds the input"):
        merge(path, file, f"{tmp_path}/", force=True)
    with pytest.raises(MissingFileError, match=r"folder .*nowhere does not exist"):
        merge(path, file, tmp_path / "nowhere" / "out.safetensors")
    with pytest.raises(
        ConfigError, match=r"d.sdelta is a delta; the first argument .* is the base"
    ):
        merge(file, file, tmp_path / "out.safetensors")


def test_force_replaces_a_file_only(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "base.safetensors", {"w": np.zeros(4, np.float32)})
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    with pytest.raises(OutputExistsError, match=r"out.safetensors exists"):
        merge(path, only(), out)
    assert out.read_bytes() == b"old"
    merge(path, only(), out, force=True)
    assert out.read_bytes() == path.read_bytes()
    out.unlink()
    out.mkdir()
    with pytest.raises(OutputExistsError, match="exists and is a folder"):
        merge(path, only(), out, force=True)


def test_weights_must_fit(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "base.safetensors", {"w": np.zeros(4, np.float32)})
    with pytest.raises(ConfigError, match="2 weights for 1 deltas"):
        merge(path, only(), weights=[1, 2])
    with pytest.raises(ConfigError, match="weight nan is not finite"):
        merge(path, only(), weights=[float("nan")])
    with pytest.raises(ConfigError, match="no delta to merge"):
        merge(path, [])


def test_a_tensor_that_cannot_be_read_passes_through(tmp_path: Path) -> None:
    """Packed 4-bit weights beside ordinary ones keep their bytes."""
    base, path = np.arange(4, dtype=np.float32), tmp_path / "m.safetensors"
    text = (
        b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
        b'"q":{"dtype":"F4","shape":[4],"data_offsets":[16,18]}}'
    )
    path.write_bytes(len(text).to_bytes(8, "little") + text + base.tobytes() + b"\x12\x34")
    delta = adding("w", base, np.random.default_rng(1), 2)
    out = tmp_path / "out.safetensors"
    merge(path, only(delta, extras={"e": np.zeros(1, np.int8)}), out, dtype="float16")
    expected = dense_reference(base, [delta], [1.0]).astype(np.float16).tobytes()
    merged = read_safetensors(out)
    assert (merged["q"], merged["w"]) == (("F4", [4], b"\x12\x34"), ("F16", [4], expected))


def test_shards_can_become_one_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(17)
    shards = [{"b": random_array(rng, (30,), "f2")}, {"a": random_array(rng, (4, 4), np.float32)}]
    folder = write_sharded(tmp_path / "model", shards, {"x": 1})
    delta = adding("b", shards[0]["b"], rng, 4)
    merge(folder, only(delta, config={"num_labels": 5}), tmp_path / "out.safetensors")
    merged = read_safetensors(tmp_path / "out.safetensors")
    assert merged["a"][2] == shards[1]["a"].tobytes()
    assert merged["b"][2] == dense_reference(shards[0]["b"], [delta], [1.0]).tobytes()
