"""Laws of merging into a folder: shards one to one, a correct index, everything else carried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_factory import random_array, read_safetensors, write_safetensors, write_sharded

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array, dtype_of
from deltakit.errors import DeltaError, OutputError, OutputExistsError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.merging.merge import merge

CONFIG = {"architectures": ["BertModel"], "torch_dtype": "float32", "sub": {"dtype": "float32"}}


@pytest.fixture
def shards() -> list[dict[str, Array]]:
    rng = np.random.default_rng(20)
    return [
        {"a": random_array(rng, (40, 30), np.float32), "ids": np.arange(6, dtype=np.int64)},
        {"b": random_array(rng, (50,), np.float32)},
        {"c": random_array(rng, (2, 3, 4), np.float32)},
    ]


@pytest.fixture
def base(tmp_path: Path, shards: list[dict[str, Array]]) -> Path:
    """A sharded folder with all that such folders hold."""
    folder = write_sharded(tmp_path / "base", shards, CONFIG)
    (folder / "tokenizer.json").write_text('{"model": "é"}', encoding="utf-8")
    (folder / "generation_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"pickle")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    write_safetensors(folder / "1_Pooling" / "model.safetensors", {"d": np.zeros(2, np.float32)})
    return folder


def delta_on(array: Array, name: str, **more: Any) -> SparseDelta:
    tensor = TensorDelta(
        name=name,
        shape=array.shape,
        dtype=dtype_of(array).name,
        mode="add",
        indices=np.array([0, array.size - 1]),
        values=np.array([0.5, -0.25]),
    )
    return SparseDelta(tensors={name: tensor}, **more)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_shards_index_and_everything_else_keep_their_bytes(
    tmp_path: Path, base: Path, shards: list[dict[str, Array]]
) -> None:
    before = files_of(base)
    report = merge(base, delta_on(shards[1]["b"], "b"), tmp_path / "out")
    merged = files_of(tmp_path / "out")
    assert files_of(base) == before
    weights = {"pytorch_model.bin", "training_args.bin", ".cache/lock", "checkpoint-5/optimizer.pt"}
    assert set(merged) == set(before) - weights
    changed = {name for name in merged if merged[name] != before[name]}
    assert changed == {"model-00002-of-00003.safetensors"}
    assert set(report.files) == set(merged)
    assert report.bytes == sum(len(data) for data in merged.values())
    assert "2 other weight files of the base are left out: pytorch_model.bin" in report.notes[-1]
    b = shards[1]["b"].copy()
    b[[0, -1]] += np.array([0.5, -0.25], np.float32)
    found = read_safetensors(tmp_path / "out" / "model-00002-of-00003.safetensors")
    assert found["b"][2] == b.tobytes()


def test_extras_join_the_last_shard_and_the_configuration_follows(
    tmp_path: Path, base: Path, shards: list[dict[str, Array]]
) -> None:
    head = np.ones((3, 4), np.float32)
    changes = {"num_labels": 3, "id2label": {"0": "è"}, "architectures": ["Classifier"]}
    delta = delta_on(shards[0]["a"], "a", extras={"head": head}, config=changes)
    merge(base, delta, tmp_path / "out")
    merged = Checkpoint(tmp_path / "out")
    assert merged.notes == []
    assert merged.tensors["head"].file.name == "model-00003-of-00003.safetensors"
    assert merged.words("head").tobytes() == head.tobytes()
    assert merged.words("c").tobytes() == shards[2]["c"].tobytes()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = [a.nbytes for tensors in shards for a in tensors.values()]
    assert index["metadata"] == {"total_size": sum(sizes) + head.nbytes}
    assert merged.config() == {**CONFIG, **changes}
    text = (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    assert text == json.dumps({**CONFIG, **changes}, indent=2) + "\n"


def test_converting_changes_index_and_configuration(
    tmp_path: Path, base: Path, shards: list[dict[str, Array]]
) -> None:
    merge(base, delta_on(shards[2]["c"], "c"), tmp_path / "out", dtype="bfloat16")
    merged = Checkpoint(tmp_path / "out")
    assert [info.dtype for info in merged.tensors.values()] == ["bfloat16"] * 3 + ["int64"]
    assert merged.words("a").tobytes() == shards[0]["a"].astype(ml_dtypes.bfloat16).tobytes()
    sizes = sum(info.nbytes for info in merged.tensors.values())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sizes
    assert merged.config() == {
        **CONFIG,
        "torch_dtype": "bfloat16",
        "sub": {"dtype": "bfloat16"},
    }


def test_a_single_file_folder_keeps_its_file_name(tmp_path: Path) -> None:
    base = tmp_path / "unet"
    base.mkdir()
    array = np.zeros(9, np.float32)
    write_safetensors(base / "diffusion_pytorch_model.safetensors", {"w": array})
    report = merge(base, delta_on(array, "w"))
    assert report.output == str(tmp_path / "unet-merged")
    assert list(report.files) == ["diffusion_pytorch_model.safetensors"]
    lone = merge(base / "diffusion_pytorch_model.safetensors", delta_on(array, "w"), tmp_path / "o")
    assert lone.is_folder
    assert files_of(tmp_path / "o") == files_of(tmp_path / "unet-merged")


def test_configuration_changes_that_have_no_place_are_said(tmp_path: Path) -> None:
    array = np.zeros(9, np.float32)
    base = tmp_path / "base"
    base.mkdir()
    path = write_safetensors(base / "model.safetensors", {"w": array})
    delta = delta_on(array, "w", config={"num_labels": 3})
    notes = merge(path, delta, tmp_path / "a.safetensors").notes
    assert "change the configuration (num_labels), but a lone file has none" in notes[-1]
    notes = merge(base, delta, tmp_path / "b.safetensors").notes
    assert "b.safetensors is a lone file, so configuration changes are not written" in notes[-1]
    assert "has no config.json" in merge(base, delta, tmp_path / "c").notes[-1]


def test_configurations_that_differ_need_a_head(
    tmp_path: Path, base: Path, shards: list[dict[str, Array]]
) -> None:
    deltas = [delta_on(shards[0]["a"], "a", config={"num_labels": n}) for n in (2, 3)]
    with pytest.raises(DeltaError, match="configuration key 'num_labels' differs between delta 0"):
        merge(base, deltas, tmp_path / "out")
    merge(base, deltas, tmp_path / "out", head=1)
    assert Checkpoint(tmp_path / "out").config() == {**CONFIG, "num_labels": 3}


def test_force_replaces_a_checkpoint_folder_and_nothing_else(
    tmp_path: Path, base: Path, shards: list[dict[str, Array]]
) -> None:
    out = tmp_path / "out"
    delta = delta_on(shards[1]["b"], "b")
    merge(base, SparseDelta(tensors={}), out)
    (out / "stale.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="out exists"):
        merge(base, delta, out)
    merge(base, delta, out, force=True)
    assert not (out / "stale.json").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out"}
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"home is a folder that holds no .safetensors file, so"):
        merge(base, delta, home, force=True)
    assert (home / "thesis.tex").exists()
    for path, text in (
        (base, "is an input"),
        (base / "x", "inside the base's"),
        (tmp_path, "holds"),
    ):
        with pytest.raises(OutputError, match=text):
            merge(base, delta, path, force=True)


def test_tensors_that_the_index_does_not_list_stay_as_they_are(
    tmp_path: Path, base: Path, shards: list[dict[str, Array]]
) -> None:
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["ids"]
    index.write_text(json.dumps(content))
    extra = {"head": np.zeros(1, np.float32)}
    merge(base, delta_on(shards[0]["a"], "a", extras=extra), tmp_path / "out")
    merged = Checkpoint(tmp_path / "out")
    assert "does not list there (such as 'ids')" in merged.notes[0]
    stored = read_safetensors(tmp_path / "out" / "model-00001-of-00003.safetensors")
    assert stored["ids"][2] == shards[0]["ids"].tobytes()
