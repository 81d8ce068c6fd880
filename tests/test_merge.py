"""Laws of merging: entries by a naive dense reference, all other bytes untouched."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_factory import random_array, read_safetensors, write_safetensors, write_sharded
from merge_reference import adding, dense_reference, only

from deltakit.delta import TensorDelta
from deltakit.errors import BaseMismatchError, ConfigError, CoordinateError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import identify
from deltakit.merging.merge import merge

KINDS: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


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
