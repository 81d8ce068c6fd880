"""Laws of quantising again: what a merge gives is what quantising the dense merge gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from bitsandbytes import functional
from checkpoint_factory import read_safetensors, write_sharded
from merge_reference import only
from quantized_lab import SCHEMES, dequantize, entries, plus, quantize, written
from safetensors.torch import load_file, save_file

from deltakit.diffing.diff import diff
from deltakit.errors import BaseMismatchError
from deltakit.merging.merge import merge


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
def test_equal_to_dequantising_adding_and_quantising_the_whole(
    tmp_path: Path, scheme: str, dtype: Any
) -> None:
    """Up to the sign of zero in fp4, which has codes for both and where blocks keep theirs."""
    base = written(tmp_path / "base.safetensors", scheme)
    delta = entries(0.01, dtype=dtype)
    report = merge(base, only(delta), tmp_path / "out.safetensors", requantize=True)
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    weight = dequantize(dict(before))
    kind = torch.float32 if dtype is np.float32 else torch.bfloat16
    expected = before | quantize(scheme, plus(weight, delta, kind).to(weight.dtype))
    assert after.keys() == expected.keys()
    for name, tensor in expected.items():
        if scheme != "fp4" or name != "w.weight":
            assert torch.equal(after[name], tensor), name
    assert torch.equal(dequantize(dict(after)), dequantize(dict(expected)))
    moved = (dequantize(dict(after)) != weight).reshape(-1)
    at = torch.from_numpy(delta.indices)
    found = report.survival
    assert found is not None and (found.tensors, found.entries) == (1, 60)
    assert found.survived == int(moved[at].sum())
    assert found.moved == int(moved.sum()) - found.survived
    assert found.survived > 0 and found.note() in report.notes


def test_doubly_quantised_scales(tmp_path: Path) -> None:
    """Codes as by one quantisation; scales, around the offset that they had, as by the second;
    blocks of 256 scales without an entry stay."""
    base = written(tmp_path / "base.safetensors", "nf4-double")
    first = entries(0.05)
    delta = first.take(first.indices < 256 * 64)  # the first block of scales only
    assert 0 < delta.nnz < first.nnz
    report = merge(base, only(delta), tmp_path / "out.safetensors", requantize=True)
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    weight = dequantize(dict(before))
    single = quantize("nf4", plus(weight, delta, torch.bfloat16))
    state = functional.QuantState.from_dict(
        {k: v for k, v in before.items() if k.startswith("w.weight.")}, device=torch.device("cpu")
    )
    old = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    touched = torch.from_numpy(np.unique(delta.indices // 64))
    scales = old.clone()
    scales[touched] = single["w.weight.absmax"][touched]
    again, inner = functional.quantize_blockwise(scales - state.offset, blocksize=256)
    assert torch.equal(after["w.weight"], single["w.weight"])
    assert torch.equal(after["w.weight.absmax"][:256], again[:256])
    assert torch.equal(after["w.weight.absmax"][256:], before["w.weight.absmax"][256:])
    assert torch.equal(after["w.weight.nested_absmax"][:1], inner.absmax[:1])
    assert torch.equal(after["w.weight.nested_absmax"][1:], before["w.weight.nested_absmax"][1:])
    moved = (dequantize(dict(after)) != weight).reshape(-1)
    assert not moved[256 * 64 :].any()
    found = report.survival
    at = torch.from_numpy(delta.indices)
    assert found is not None and found.survived == int(moved[at].sum()) > 0
    assert found.moved == int(moved.sum()) - found.survived


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_without_entries_keep_their_bytes(tmp_path: Path, scheme: str) -> None:
    """So do all other tensors, and the header; the dry run counts the same."""
    base = written(tmp_path / "base.safetensors", scheme)
    delta = entries(0.05, count=3)
    dry = merge(base, only(delta), tmp_path / "out.safetensors", requantize=True, dry_run=True)
    assert not (tmp_path / "out.safetensors").exists()
    report = merge(base, only(delta), tmp_path / "out.safetensors", requantize=True)
    assert dry.survival == report.survival
    assert dry.survival is not None and dry.as_dict()["survival"]["entries"] == 3
    before = read_safetensors(base)
    after = read_safetensors(tmp_path / "out.safetensors")
    size = len(base.read_bytes()) - sum(len(each[2]) for each in before.values())
    assert base.read_bytes()[:size] == (tmp_path / "out.safetensors").read_bytes()[:size]
    block = 200 if scheme == "int8" else 64
    per_block = 200 if scheme == "int8" else 32
    changed = set(delta.indices // block)
    codes = [np.frombuffer(each["w.weight"][2], np.uint8) for each in (before, after)]
    differ = set(np.flatnonzero(codes[0] != codes[1]) // per_block)
    assert differ and differ <= changed
    for name, each in before.items():
        if name not in ("w.weight", "w.SCB", "w.weight.absmax", "w.weight.nested_absmax"):
            assert after[name] == each, name


@pytest.mark.parametrize("shape", [(7, 33), (1, 2), (64,), (3, 5, 64)])
@pytest.mark.parametrize("scheme", ["nf4", "nf4-double", "fp4"])
def test_any_shape(tmp_path: Path, scheme: str, shape: tuple[int, ...]) -> None:
    """Short blocks and odd counts: what is read back is what a dense merge is read back as."""
    base = written(tmp_path / "base.safetensors", scheme, shape)
    delta = entries(0.05, count=2, shape=shape)
    report = merge(base, only(delta), tmp_path / "out.safetensors", requantize=True)
    weight = dequantize(load_file(base)).reshape(shape)
    after = dequantize(load_file(tmp_path / "out.safetensors")).reshape(shape)
    flat, at = weight.reshape(-1) != after.reshape(-1), torch.from_numpy(delta.indices)
    found = report.survival
    assert found is not None
    assert (found.entries, found.survived) == (2, int(flat[at].sum()))
    assert found.moved == int(flat.sum()) - found.survived
    if scheme != "nf4-double":
        dense = quantize(scheme, plus(weight, delta, torch.bfloat16))
        assert torch.equal(dequantize(dense).reshape(shape), after)


def test_codes_may_be_stored_in_any_dtype(tmp_path: Path) -> None:
    """bnb_4bit_quant_storage: the same bytes under another name, and weights are not for them."""
    base = written(tmp_path / "base.safetensors", "nf4")
    stored = load_file(base)
    stored["w.weight"] = stored["w.weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    save_file(stored, tmp_path / "stored.safetensors")
    for name in ("base", "stored"):
        out = tmp_path / f"{name}-out.safetensors"
        merge(tmp_path / f"{name}.safetensors", only(entries(0.02)), out, requantize=True)
    one, two = (read_safetensors(tmp_path / f"{n}-out.safetensors") for n in ("base", "stored"))
    assert one["w.weight"][2] == two["w.weight"][2] and two["w.weight"][0] == "BF16"
    delta = diff(tmp_path / "stored.safetensors", tmp_path / "stored-out.safetensors")
    merge(tmp_path / "stored.safetensors", delta, tmp_path / "again.safetensors")
    assert read_safetensors(tmp_path / "again.safetensors") == two
    with pytest.raises(BaseMismatchError, match="bitsandbytes nf4"):
        merge(tmp_path / "stored.safetensors", delta, tmp_path / "half.safetensors", weights=[0.5])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_and_statistics_in_different_files(tmp_path: Path, scheme: str, workers: int) -> None:
    one = written(tmp_path / "base.safetensors", scheme)
    stored = {n: t.numpy() for n, t in load_file(one).items() if n != "norm.weight"}
    codes = {"w.weight": stored.pop("w.weight")}
    folder = write_sharded(tmp_path / "base", [stored, codes])
    delta = only(entries(0.05))
    alone = merge(one, delta, tmp_path / "one.safetensors", requantize=True)
    report = merge(folder, delta, tmp_path / "out", requantize=True, workers=workers)
    assert report.survival == alone.survival
    expected = read_safetensors(tmp_path / "one.safetensors")
    found = [read_safetensors(file) for file in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert [list(each) for each in found] == [list(stored), list(codes)]
    for name, each in (found[0] | found[1]).items():
        assert each == expected[name], name


def test_several_deltas_and_methods(tmp_path: Path) -> None:
    """At once, or stacked first: the same bits; the full-precision identity is let through."""
    base = written(tmp_path / "base.safetensors", "int8")
    deltas = [only(entries(0.01)), only(entries(0.02, count=40))]
    merge(base, deltas, tmp_path / "a.safetensors", weights=[0.5, 0.5], requantize=True)
    merge(
        base,
        deltas,
        tmp_path / "b.safetensors",
        weights=[0.5, 0.5],
        method="linear",
        requantize=True,
    )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "a.safetensors").read_bytes() != base.read_bytes()
