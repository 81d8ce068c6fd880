"""Laws of reading checkpoints: the words read are the bytes written, and nothing else is opened."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_factory import random_array, write_safetensors, write_sharded

from deltakit.dtypes import DTYPES, Array
from deltakit.errors import CoordinateError, FormatError, MissingFileError
from deltakit.formats.checkpoint import Checkpoint


def _tensors(rng: np.random.Generator) -> dict[str, Array]:
    return {
        f"t.{name}": random_array(rng, shape, kind.numpy)
        for (name, kind), shape in zip(
            DTYPES.items(), [(3, 5), (), (7,), (2, 3, 4), (0, 4)] * 3, strict=True
        )
    }


@pytest.mark.parametrize("pad", [True, False])
def test_words_are_the_bytes_written(tmp_path: Path, pad: bool) -> None:
    """Every dtype, 0-d, empty and unaligned bodies included."""
    tensors = _tensors(np.random.default_rng(0))
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1].itemsize))  # odd offsets first
    checkpoint = Checkpoint(write_safetensors(tmp_path / "m.safetensors", tensors, pad=pad))
    assert checkpoint.names == sorted(tensors)
    assert checkpoint.total_weights == sum(a.size for a in tensors.values())
    assert checkpoint.directory is None
    for name, array in tensors.items():
        info = checkpoint.tensors[name]
        assert (f"t.{info.dtype}", info.shape) == (name, array.shape)
        assert checkpoint.words(name).tobytes() == array.tobytes()
        assert checkpoint.read(name).tobytes() == array.tobytes()
        assert not checkpoint.words(name).flags.writeable


def test_gather_is_fancy_indexing(tmp_path: Path) -> None:
    """For sorted and for shuffled indices, over several chunks."""
    rng = np.random.default_rng(1)
    array = random_array(rng, (300, 70), ml_dtypes.bfloat16)
    checkpoint = Checkpoint(write_safetensors(tmp_path / "m.safetensors", {"a": array}))
    flat = array.reshape(-1).view(np.uint16)
    for indices in (np.arange(21000), rng.permutation(21000)[:5000], np.array([], np.int64)):
        assert np.array_equal(checkpoint.gather("a", indices), flat[indices])
    assert np.array_equal(checkpoint.read("a", 100, 2000), flat[100:2000])
    for bad in (-1, 21000):
        with pytest.raises(CoordinateError, match=f"has 21000 elements, index {bad} is outside"):
            checkpoint.gather("a", np.array([5, bad]))


def test_more_than_four_billion_elements(tmp_path: Path) -> None:
    """A sparse file of 2^32 + 3 bytes is read at its very end without reading the rest."""
    path = tmp_path / "big.safetensors"
    numel = 2**32 + 3
    content = {"w": {"dtype": "I8", "shape": [numel], "data_offsets": [0, numel]}}
    text = json.dumps(content).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + numel)
        file.seek(-1, 2)
        file.write(b"\x07")
    checkpoint = Checkpoint(path)
    assert checkpoint.total_weights == numel
    assert checkpoint.gather("w", np.array([0, numel - 1])).tolist() == [0, 7]


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    shards = [{"b": random_array(rng, (4, 4), np.float32)}, {"a": random_array(rng, (3,), "f2")}]
    folder = write_sharded(tmp_path / "model", shards, {"num_labels": 2})
    for path in (folder, folder / "model.safetensors.index.json"):
        checkpoint = Checkpoint(path)
        assert checkpoint.names == ["a", "b"]
        assert checkpoint.directory == folder
        assert [f.name for f in checkpoint.files] == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]
        assert checkpoint.words("a").tobytes() == shards[1]["a"].tobytes()
        assert checkpoint.config() == {"num_labels": 2}
        assert checkpoint.notes == []


def test_the_file_that_transformers_reads_is_chosen(tmp_path: Path) -> None:
    """model.safetensors before an index, and one other file where neither exists."""
    write_safetensors(tmp_path / "adapter.safetensors", {"x": np.zeros(1, np.float32)})
    assert Checkpoint(tmp_path).names == ["x"]
    write_safetensors(tmp_path / "other.safetensors", {"y": np.zeros(1, np.float32)})
    with pytest.raises(FormatError, match=r"2 \*.safetensors files \(adapter.safetensors, other"):
        Checkpoint(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {"z": np.zeros(1, np.float32)})
    assert Checkpoint(tmp_path).names == ["z"]


def test_missing_things_are_said_in_one_line(tmp_path: Path) -> None:
    cases = {
        str(tmp_path / "no.safetensors"): "no.safetensors does not exist",
        "google/gemma-9": "if it is a model on the Hub, write hf://google/gemma-9",
        str(tmp_path): "holds no .safetensors file",
    }
    for path, text in cases.items():
        with pytest.raises(MissingFileError, match=text) as caught:
            Checkpoint(path)
        assert "\n" not in str(caught.value)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + b"\0" * 60)
    with pytest.raises(
        MissingFileError, match=r"pytorch_model.bin but no .safetensors file; .* conv"
    ):
        Checkpoint(tmp_path)
    with pytest.raises(FormatError, match="deltakit never unpickles"):
        Checkpoint(tmp_path / "pytorch_model.bin")


def test_unknown_tensor_names_its_neighbours(tmp_path: Path) -> None:
    path = write_safetensors(
        tmp_path / "m.safetensors", {"layer.0.weight": np.zeros(2, np.float32)}
    )
    with pytest.raises(
        CoordinateError, match=r"no tensor 'layer.1.weight'; nearest: layer.0.weight"
    ):
        Checkpoint(path).words("layer.1.weight")


@pytest.mark.parametrize(
    "name",
    [
        "../evil.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "x.bin",
        7,
    ],
)
def test_index_cannot_leave_the_folder(tmp_path: Path, name: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(FormatError, match="which is no plain name"):
        Checkpoint(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    one = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    folder = write_sharded(tmp_path / "model", [one, {"c": np.zeros(1, np.float32)}])
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["b"]
    index.write_text(json.dumps(content))
    (note,) = Checkpoint(folder).notes
    assert "00001-of-00002.safetensors holds 1 tensors that the index does not list there" in note
    content["weight_map"]["b"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(
        FormatError, match=r"'b' is mapped to model-00002-of-00002.safetensors, which"
    ):
        Checkpoint(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        MissingFileError, match=r"names model-00002-of-00002.safetensors, which is mis"
    ):
        Checkpoint(folder)
    for broken, text in (
        ("{}", "has no weight_map"),
        ("[", "not JSON"),
        ('{"weight_map":{}}', "no w"),
    ):
        index.write_text(broken)
        with pytest.raises(FormatError, match=text):
            Checkpoint(folder)


def test_dtype_that_cannot_be_read_is_only_an_error_when_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    text = b'{"q":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x12\x34")
    checkpoint = Checkpoint(path)
    assert checkpoint.tensors["q"].dtype == "F4"
    with pytest.raises(FormatError, match="tensor 'q' has dtype F4, which deltakit cannot read"):
        checkpoint.words("q")


def test_truncated_at_every_byte_is_a_typed_error(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"a": np.arange(5, dtype=np.int16)})
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(FormatError):
            Checkpoint(path)
