"""Laws of verify: sound files pass, every flipped byte and every other base is reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import write_safetensors

import deltakit as dk
from deltakit.delta import SparseDelta, TensorDelta
from deltakit.errors import MissingFileError
from deltakit.formats import sdelta
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import identify
from deltakit.verification import verify


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = {name: np.arange(3000, dtype=np.float32) for name in ("a", "b")}
    return write_safetensors(tmp_path / "base.safetensors", tensors)


@pytest.fixture
def file(tmp_path: Path, base: Path) -> Path:
    tensors = {}
    for name in ("a", "b"):
        tensors[name] = TensorDelta(
            name=name,
            shape=(3000,),
            dtype="float32",
            mode="add",
            indices=np.arange(0, 3000, 7),
            values=np.linspace(1, 2, 429),
        )
    identity = identify(Checkpoint(base), {name: t.indices for name, t in tensors.items()})
    delta = SparseDelta(tensors=tensors, extras={"head": np.ones(5, np.int8)}, base=identity)
    sdelta.save(delta, tmp_path / "d.sdelta")
    return tmp_path / "d.sdelta"


def test_a_sound_file_passes(file: Path, base: Path) -> None:
    report = verify(file, base)
    assert report.ok
    assert (report.tensors, report.extras, report.entries) == (2, 1, 858)
    assert (report.problems, report.notes) == ((), ())
    assert json.loads(json.dumps(report.as_dict()))["ok"] is True
    alone = verify(file)
    assert alone.ok
    assert alone.notes == ("no base given, so only the file itself was checked",)
    assert dk.verify is verify


def test_every_byte_counts(file: Path) -> None:
    """A flip anywhere is a problem, and one in a stream leaves the other tensors readable."""
    data = file.read_bytes()
    body = 8 + int.from_bytes(data[:8], "little")
    steps = [*range(0, body, 97), *range(body, len(data), 31), len(data) - 1]
    for at in steps:
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        file.write_bytes(damaged)
        report = verify(file)
        assert not report.ok, at
        assert all("\n" not in problem for problem in report.problems)
        if at >= body:
            assert report.tensors + report.extras == 2
            assert "differ from their digest" in report.problems[0]


def test_another_base_is_reported_tensor_by_tensor(file: Path, tmp_path: Path) -> None:
    tensors = {
        "a": np.arange(3000, dtype=np.float32) + 1,
        "b": np.arange(3000, dtype=np.float32),
        "head": np.ones(4, np.int8),
    }
    report = verify(file, write_safetensors(tmp_path / "other.safetensors", tensors))
    assert not report.ok
    assert report.tensors == 1
    assert "tensor 'a' has other values (sample digest" in report.problems[0]
    assert "extra 'head' has shape [5]" in report.problems[1]


def test_a_delta_without_a_base_says_so_once(file: Path, base: Path, tmp_path: Path) -> None:
    tensors = sdelta.load(file).tensors
    sdelta.save(SparseDelta(tensors=tensors), tmp_path / "plain.sdelta")
    report = verify(tmp_path / "plain.sdelta", base)
    assert report.ok
    (note,) = report.notes
    assert note == "the delta records no base, so nothing shows that this is the right one"


def test_what_is_not_there_is_an_error(tmp_path: Path, file: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no.sdelta"):
        verify(tmp_path / "no.sdelta")
    with pytest.raises(MissingFileError, match=r"no.safetensors does not exist"):
        verify(file, tmp_path / "no.safetensors")
    (tmp_path / "text.sdelta").write_text("not a delta at all")
    report = verify(tmp_path / "text.sdelta")
    assert not report.ok
    assert "not an .sdelta file" in report.problems[0]
