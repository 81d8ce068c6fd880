"""Laws of merging whole tensors: appended, replaced, and chosen where deltas differ."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_factory import random_array, read_safetensors, write_safetensors
from merge_reference import adding, dense_reference, only

from deltakit.dtypes import dtype_of
from deltakit.errors import ConfigError, DeltaError
from deltakit.formats import sdelta
from deltakit.formats.checkpoint import Checkpoint
from deltakit.merging.merge import merge


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
