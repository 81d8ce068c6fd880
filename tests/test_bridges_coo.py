"""Plain COO files and vLLM's patches: round trips, foreign files, hostile files."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import deltakit as dk
from deltakit.dtypes import DTYPES
from deltakit.errors import BaseMismatchError, ConfigError, DeltakitError, FormatError
from deltakit.formats.checkpoint import Checkpoint

FLOATS = ["float32", "float64", "bfloat16", "float16"]


@st.composite
def deltas(draw: st.DrawFn, modes: tuple[str, ...] = ("add", "set")) -> dk.SparseDelta:
    """Deltas of add and set tensors of several dtypes and shapes, with an extra at times."""
    tensors = {}
    for name in draw(st.lists(st.sampled_from(["a", "b.weight", "é"]), unique=True, min_size=1)):
        shape = draw(st.sampled_from([(7,), (3, 4), (2, 3, 2), (0,), ()]))
        kind, mode = DTYPES[draw(st.sampled_from(FLOATS))], draw(st.sampled_from(modes))
        numel = int(np.prod(shape))
        indices = sorted(draw(st.sets(st.integers(0, max(numel - 1, 0)), max_size=numel)))
        numbers = [draw(st.sampled_from([-1.5, -0.0, 0.0, 0.25, 3.0])) for _ in indices]
        values = np.array(numbers, kind.numpy if mode == "set" else kind.compute)
        tensors[name] = dk.TensorDelta(
            name=name,
            shape=shape,
            dtype=kind.name,
            mode=mode,
            indices=np.array(indices, np.int64),
            values=values,
        )
    extras = {"head": np.ones((2, 2), ml_dtypes.bfloat16)} if draw(st.booleans()) else {}
    return dk.SparseDelta(tensors=tensors, extras=extras)


def unsigned(delta: dk.SparseDelta) -> dk.SparseDelta:
    """The delta without base and provenance, which plain COO does not hold."""
    return replace(delta, base=None, provenance={})


@settings(max_examples=30)
@given(delta=deltas())
def test_coo_there_and_back(delta: dk.SparseDelta) -> None:
    with tempfile.TemporaryDirectory() as folder:
        native, plain, again = (Path(folder, n) for n in ("d.sdelta", "d.safetensors", "e.sdelta"))
        dk.save(delta, native)
        dk.convert(native, plain, to_format="coo-safetensors")
        arrays = load_file(plain)  # any reader of safetensors opens it
        for name, tensor in delta.tensors.items():
            assert arrays[f"{name}.indices"].dtype == np.int32
            assert np.array_equal(arrays[f"{name}.indices"], tensor.indices)
        report = dk.convert(plain, again)
        assert report.from_format == "coo-safetensors"
        assert unsigned(dk.load(again)).equals(delta)


def test_equal_deltas_give_equal_bytes(delta_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        dk.convert(delta_file, tmp_path / name, to_format="coo-safetensors")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_is_lost_is_told(delta_file: Path, tmp_path: Path) -> None:
    report = dk.convert(delta_file, tmp_path / "d.safetensors", to_format="coo-safetensors")
    (note,) = report.notes
    lost = "the order of unmasking, the base's identity, the provenance"
    assert note == f"not held by this format, so lost: {lost}"


def foreign(path: Path, base: Checkpoint, **changes: Any) -> Path:
    """New weights of the base as grail writes them: int32 indices, unsorted here."""
    arrays = {
        "w.indices": np.array([599, 0, 30], np.int32),
        "w.values": np.array([1.0, 2.0, 3.0], np.float32),
        "b.indices": np.array([19], np.int32),
        "b.values": np.array([-1.0], np.float32),
    }
    save_file({**arrays, **changes}, path)
    return path


def test_files_of_others(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plain = foreign(tmp_path / "delta.safetensors", checkpoint)
    with pytest.raises(ConfigError, match=r"has no shapes of its tensors; give the base"):
        dk.convert(plain, tmp_path / "d.sdelta")
    with pytest.raises(ConfigError, match=r"new weights \(--mode set\) or differences"):
        dk.convert(plain, tmp_path / "d.sdelta", base=checkpoint)
    report = dk.convert(plain, tmp_path / "d.sdelta", base=checkpoint, mode="set")
    assert (report.found, report.entries) == ("COO safetensors, 2 tensors", 4)
    dk.merge(checkpoint.path, [tmp_path / "d.sdelta"], tmp_path / "merged.safetensors")
    expected = load_file(checkpoint.path)
    expected["w"].reshape(-1)[[599, 0, 30]] = [1.0, 2.0, 3.0]
    expected["b"][19] = -1.0
    merged = load_file(tmp_path / "merged.safetensors")
    assert all(np.array_equal(merged[name], expected[name]) for name in expected)

    dk.convert(plain, tmp_path / "a.sdelta", base=checkpoint, mode="add")
    assert {t.mode for t in dk.load(tmp_path / "a.sdelta").tensors.values()} == {"add"}


HOSTILE = {
    "out of range": ({"w.indices": np.array([600, 0, 1], np.int32)}, "index 600 is out of range"),
    "negative": ({"w.indices": np.array([-1, 0, 1])}, "index -1 is out of range"),
    "twice": ({"w.indices": np.array([5, 0, 5])}, "index 5 stands twice"),
    "lengths": ({"w.indices": np.array([5, 0])}, r"expected integers \[nnz\] and values \[nnz\]"),
    "matrix": ({"w.indices": np.array([[5, 0, 1]])}, r"expected integers \[nnz\]"),
    "floats": ({"w.indices": np.array([5.0, 0, 1])}, r"expected integers \[nnz\]"),
    "another dtype": ({"w.values": np.ones(3, np.float16)}, "must be of the base's own dtype"),
    "unknown": ({"x.indices": np.array([0]), "x.values": np.ones(1)}, "has no tensor 'x'"),
}


@pytest.mark.parametrize("attack", list(HOSTILE))
def test_hostile_files_are_refused(attack: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    changes, message = HOSTILE[attack]
    plain = foreign(tmp_path / "delta.safetensors", checkpoint, **changes)
    with pytest.raises(DeltakitError, match=message):
        dk.convert(plain, tmp_path / "d.sdelta", base=checkpoint, mode="set")
    assert not (tmp_path / "d.sdelta").exists()


METADATA = {
    "not JSON": "{",
    "no tensors": '{"version":1}',
    "another version": '{"version":2,"tensors":{}}',
    "other names": '{"version":1,"tensors":{"v":{"dtype":"float32","mode":"add","shape":[9]}}}',
    "no shape": '{"version":1,"tensors":{"w":{"dtype":"float32","mode":"add"}}}',
    "negative shape": '{"version":1,"tensors":{"w":{"dtype":"float32","mode":"add","shape":[-9]}}}',
    "no dtype": '{"version":1,"tensors":{"w":{"dtype":"float33","mode":"add","shape":[9]}}}',
    "no mode": '{"version":1,"tensors":{"w":{"dtype":"float32","mode":"sub","shape":[9]}}}',
    "too small": '{"version":1,"tensors":{"w":{"dtype":"float32","mode":"add","shape":[3]}}}',
}


@pytest.mark.parametrize("attack", list(METADATA))
def test_hostile_metadata_are_refused(attack: str, tmp_path: Path) -> None:
    arrays = {"w.indices": np.array([3]), "w.values": np.ones(1, np.float32)}
    save_file(arrays, tmp_path / "x", metadata={"deltakit.coo": METADATA[attack]})
    with pytest.raises(DeltakitError):
        dk.convert(tmp_path / "x", tmp_path / "d.sdelta", from_format="coo-safetensors")


def test_a_checkpoint_is_no_delta(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is of no known format; known: "):
        dk.convert(checkpoint.path, tmp_path / "d.sdelta")


def test_an_sdelta_is_no_coo_although_it_is_safetensors(delta_file: Path) -> None:
    from deltakit.formats.bridges import recognise

    assert recognise(delta_file) == ("sdelta", "deltakit delta, 2 tensors")


def test_patches_for_vllm(delta_file: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The values are what merging writes, in the checkpoint's dtype and coordinates."""
    with pytest.raises(ConfigError, match="holds differences; give the base"):
        dk.convert(delta_file, tmp_path / "patch", to_format="vllm-patch")
    dk.convert(delta_file, tmp_path / "patch", to_format="vllm-patch", base=checkpoint)
    dk.merge(checkpoint.path, [delta_file], tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    arrays = load_file(tmp_path / "patch" / "patches.safetensors")
    manifest = json.loads((tmp_path / "patch" / "manifest.json").read_text())
    assert [row["name"] for row in manifest["patches"]] == ["b", "w"]
    for row in manifest["patches"]:
        indices, values = arrays[row["indices"]], arrays[row["values"]]
        target = merged[row["name"]]
        assert (row["shape"], row["dtype"]) == (list(target.shape), "float32")
        assert indices.dtype == np.int32
        assert (np.diff(indices) > 0).all()
        assert np.array_equal(values, target.reshape(-1)[indices])

    dk.convert(tmp_path / "patch", tmp_path / "again.sdelta", base=checkpoint)
    dk.merge(checkpoint.path, [tmp_path / "again.sdelta"], tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert all(np.array_equal(merged[name], again[name]) for name in merged)


def test_what_vllm_does_not_take(tmp_path: Path) -> None:
    for dtype, value, message in (
        ("float32", np.nan, "sets NaN, which means an unchanged weight"),
        ("int8", 3, "vLLM patches floats only"),
    ):
        tensor = dk.TensorDelta(
            name="w",
            shape=(4,),
            dtype=dtype,
            mode="set",
            indices=np.array([1]),
            values=np.array([value], dtype),
        )
        dk.save(dk.SparseDelta(tensors={"w": tensor}), tmp_path / "d.sdelta")
        with pytest.raises(ConfigError, match=message):
            dk.convert(tmp_path / "d.sdelta", tmp_path / "patch", to_format="vllm-patch")
    dk.save(dk.SparseDelta(tensors={}, extras={"h": np.ones(2)}), tmp_path / "d.sdelta")
    with pytest.raises(ConfigError, match=r"1 extras \(such as 'h'\) are none; --lossy"):
        dk.convert(tmp_path / "d.sdelta", tmp_path / "patch", to_format="vllm-patch")


def test_a_manifest_that_tells_other_things(
    delta_file: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    dk.convert(delta_file, tmp_path / "patch", to_format="vllm-patch", base=checkpoint)
    file = tmp_path / "patch" / "manifest.json"
    content = json.loads(file.read_text())
    content["patches"].reverse()
    file.write_text(json.dumps(content))
    with pytest.raises(FormatError, match="tell of different tensors"):
        dk.convert(tmp_path / "patch", tmp_path / "d.sdelta")


def test_values_of_the_wrong_base(
    delta_file: Path, checkpoint: Checkpoint, other_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(BaseMismatchError, match="is not the base of the delta"):
        dk.convert(delta_file, tmp_path / "p", to_format="vllm-patch", base=other_checkpoint)
