"""Pickles of others: read without running them, refused in one line where they ask for more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from foreign_files import Attack, Call, plain_pickle, repacked

from deltakit.errors import FormatError
from deltakit.formats.bridges import BRIDGES, recognise, torch_pickle
from deltakit.formats.bridges.foreign_tensors import NamedArrays


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def refuse(path: Path, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        torch_pickle.read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


DTYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.int16: np.int16,
    torch.int64: np.int64,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_out_as_they_went_in(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(4, 6).to(dtype)
    content = {"plain": tensor, "view": tensor.t()[1:, ::2], "scalar": tensor[1, 1]}
    found = NamedArrays(saved(tmp_path / "a.bin", content))
    for name, expected in content.items():
        assert found[name].dtype == DTYPES[dtype]
        assert found[name].shape == tuple(expected.shape)
        assert found[name].tolist() == expected.tolist()


@pytest.mark.parametrize("place", ["first", "behind 64 kB"])
def test_an_attack_is_refused_and_not_run(tmp_path: Path, place: str) -> None:
    trace = tmp_path / "trace"
    before = {} if place == "first" else {f"name {n:09}": n for n in range(10_000)}
    path = saved(tmp_path / "attack.bin", before | {"w": Attack(trace)})
    refuse(path, rf"asks for {os.system.__module__}\.system, which deltakit does not run")
    assert not trace.exists()


@pytest.mark.parametrize("name", [record.name for record in BRIDGES])
def test_no_bridge_runs_an_attack(tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"
    path = saved(tmp_path / "attack.bin", {"w": Attack(trace)})
    assert BRIDGES[name]().recognise(path) is None
    with pytest.raises(FormatError, match="is of no known format"):
        recognise(path)
    assert not trace.exists()


def test_memory_by_a_number_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"w": Call(bytearray, (2**50,))})
    refuse(path, r"asks for builtins\.bytearray")


def test_only_stand_ins_are_let_in(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"w": np.int64(7)})
    refuse(path, r"asks for numpy\.\w+\.multiarray\.scalar")
    allowed = {f"numpy.{core}.multiarray.scalar": lambda *_: 7 for core in ("core", "_core")}
    assert torch_pickle.read(path, allowed | {"numpy.dtype": Plain}) == {"w": 7}
    refuse(path, r"asks for numpy\.\w+\.multiarray\.scalar")  # the allow-list does not stay


class Plain:
    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def test_what_is_no_torch_file(tmp_path: Path) -> None:
    text = tmp_path / "text.bin"
    text.write_text("hello")
    whole = saved(tmp_path / "whole.bin", {"w": torch.ones(100)})
    truncated = tmp_path / "truncated.bin"
    truncated.write_bytes(whole.read_bytes()[:-200])
    old = tmp_path / "old.bin"
    torch.save({"w": torch.ones(3)}, old, _use_new_zipfile_serialization=False)
    bare = plain_pickle(tmp_path / "bare.bin", {"w": 1})
    for path in (text, truncated, old, bare, tmp_path / "missing.bin"):
        refuse(path, "no file of torch.save")
        assert torch_pickle.peek(path) is None


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"w": torch.zeros(2**20)})
    packed = repacked(path, tmp_path / "packed.bin", compressed=True)
    assert packed.stat().st_size < path.stat().st_size / 100
    refuse(packed, "is compressed")


def test_a_tensor_larger_than_its_record_is_refused(tmp_path: Path) -> None:
    """Four floats that claim to be 65,536, in the record alone and in the tensor as well."""
    path = saved(tmp_path / "a.bin", {"w": torch.arange(4.0)})
    pickled = b"".join(_records(path, "data.pkl"))
    claimed = pickled.replace(b"K\x04tq\x07Q", b"J\x00\x00\x01\x00tq\x07Q")
    assert claimed != pickled
    both = claimed.replace(b"K\x04\x85q\x08", b"J\x00\x00\x01\x00\x85q\x08")
    assert both != claimed
    refuse(repacked(path, tmp_path / "both.bin", data_pkl=both), "cannot be read")


def test_a_tensor_of_one_element_spread_wide_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"w": torch.zeros(1).expand(2**40)})
    tensor = torch_pickle.read(path)["w"]
    with pytest.raises(FormatError, match="needs more than the 4 bytes"):
        torch_pickle.array("w", tensor)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds list, expected tensors by name"),
        ({1: torch.ones(2)}, "holds dict, expected tensors by name"),
        ({"w": 1}, "expected a tensor, found int"),
        ({"w": torch.eye(3).to_sparse()}, "expected a dense one"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "expected a dense one"),
        ({"w": torch.empty(2, device="meta")}, "expected a dense one"),
    ],
)
def test_a_state_dict_is_dense_tensors_by_name(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        NamedArrays(saved(tmp_path / "a.bin", content))


def test_a_look_is_bounded_and_runs_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    content = {f"name {n:09}": n for n in range(10_000)} | {"w": Attack(trace)}
    seen = torch_pickle.peek(saved(tmp_path / "a.bin", content))
    assert seen is not None
    assert "name 000000000" in seen.strings
    assert "name 000009999" not in seen.strings
    assert seen.wanted == ()
    assert not trace.exists()


def _records(path: Path, last: str) -> list[bytes]:
    import zipfile

    with zipfile.ZipFile(path) as archive:
        return [archive.read(n) for n in archive.namelist() if n.endswith(last)]
