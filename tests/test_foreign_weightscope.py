"""Patches of weightscope itself, and patches that weightscope itself applies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import weightscope
import zstandard
from safetensors.torch import load_file, save_file

import deltakit as dk
from deltakit.conversion import convert
from deltakit.errors import BaseMismatchError, ConfigError, DeltakitError
from deltakit.formats.bridges import recognise

State = dict[str, torch.Tensor]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def model() -> State:
    generator = torch.Generator().manual_seed(0)
    made = {
        "a.weight": torch.randn(8, 12, generator=generator),
        "b.weight": torch.randn(40, generator=generator).bfloat16(),
        "c.weight": torch.randn(3, 3, 3, generator=generator).half(),
    }
    return made | {"steps": torch.arange(5)}


def tuned() -> State:
    state = model()
    state["a.weight"][2, 3:9] += 0.5
    state["b.weight"][::7] *= -1
    state["c.weight"][0, 1, 2] = torch.inf
    state["steps"][3] = -9
    return state


def write(folder: Path, state: State) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(BITS.get(tensor.dtype, tensor.dtype))


def equal(found: State, expected: State) -> bool:
    return set(found) == set(expected) and all(
        torch.equal(bits(found[name]), bits(tensor)) for name, tensor in expected.items()
    )


def patch(tmp_path: Path, before: State, after: State, threshold: float = 0.0) -> tuple[Path, Path]:
    """The base's folder and a patch written by weightscope."""
    base, other = write(tmp_path / "base", before), write(tmp_path / "tuned", after)
    weightscope.export_patch(str(base), str(other), tmp_path / "p.wsp", threshold=threshold)
    return base, tmp_path / "p.wsp"


@pytest.mark.parametrize("given", [False, True], ids=["alone", "with the base"])
def test_a_patch_by_weightscope_merges_to_the_tuned_model(tmp_path: Path, given: bool) -> None:
    after = tuned() | {"head.weight": torch.randn(2, 12)}
    base, source = patch(tmp_path, model(), after)
    assert recognise(source) == ("weightscope", "weightscope patch, 5 tensors")
    report = convert(source, tmp_path / "out.sdelta", base=base if given else None)
    assert (report.entries, report.extra_weights, report.notes) == (6 + 6 + 1 + 1, 24, ())
    delta = dk.load(tmp_path / "out.sdelta")
    assert {tensor.mode for tensor in delta.tensors.values()} == {"set"}
    assert all((t.base_values is not None) == given for t in delta.tensors.values())
    dk.merge(base, delta, tmp_path / "merged")
    assert equal(load_file(tmp_path / "merged" / "model.safetensors"), after)


def test_a_patch_for_weightscope_is_applied_by_weightscope(tmp_path: Path) -> None:
    base = write(tmp_path / "base", model())
    after = tuned() | {"head.weight": torch.randn(2, 12)}
    delta = dk.diff(base, write(tmp_path / "tuned", after))
    whole = torch.randn(8, 12).numpy()  # an extra that replaces a tensor of the base
    tensors = {name: t for name, t in delta.tensors.items() if name != "a.weight"}
    extras = {**delta.extras, "a.weight": whole}
    dk.save(dk.SparseDelta(tensors=tensors, extras=extras, base=delta.base), tmp_path / "d.sdelta")
    convert(tmp_path / "d.sdelta", tmp_path / "p.wsp", to_format="weightscope", base=base)
    weightscope.apply_patch(tmp_path / "p.wsp", str(base), tmp_path / "applied.safetensors")
    expected = after | {"a.weight": torch.from_numpy(whole)}
    assert equal(load_file(tmp_path / "applied.safetensors"), expected)


def test_there_and_back(tmp_path: Path) -> None:
    base, source = patch(tmp_path, model(), tuned())
    convert(source, tmp_path / "1.sdelta", base=base)
    convert(tmp_path / "1.sdelta", tmp_path / "2.wsp", to_format="weightscope", base=base)
    convert(tmp_path / "2.wsp", tmp_path / "2.sdelta", base=base)
    first, second = (dk.load(tmp_path / f"{n}.sdelta") for n in (1, 2))
    assert all(t.equals(second.tensors[name]) for name, t in first.tensors.items())
    assert list(first.tensors) == list(second.tensors)


def test_differences_are_brought_to_bits(tmp_path: Path) -> None:
    """An add delta as a patch: weightscope gives what merging gives."""
    base = write(tmp_path / "base", model())
    tensor = dk.TensorDelta(
        name="b.weight",
        shape=(40,),
        dtype="bfloat16",
        mode="add",
        indices=np.array([1, 30]),
        values=np.array([0.1, -3.3], np.float32),
    )
    dk.save(dk.SparseDelta(tensors={"b.weight": tensor}), tmp_path / "d.sdelta")
    dk.merge(base, dk.load(tmp_path / "d.sdelta"), tmp_path / "merged")
    convert(tmp_path / "d.sdelta", tmp_path / "p.wsp", to_format="weightscope", base=base)
    weightscope.apply_patch(tmp_path / "p.wsp", str(base), tmp_path / "applied.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert equal(load_file(tmp_path / "applied.safetensors"), merged)


def test_what_the_patch_or_the_delta_lacks_is_told(tmp_path: Path) -> None:
    before = model() | {"gone.weight": torch.ones(2)}
    base, source = patch(tmp_path, before, tuned(), threshold=1e-6)
    report = convert(source, tmp_path / "out.sdelta", base=base)
    assert any("left out differences of up to 1e-06" in note for note in report.notes)
    assert any("removes 1 tensors (such as 'gone.weight')" in note for note in report.notes)


def test_the_same_values_in_another_dtype_become_the_bases(tmp_path: Path) -> None:
    """weightscope applies a float32 model's values to a bfloat16 base by casting them."""
    after = model()
    after["b.weight"] = after["b.weight"].float() + 0.1
    base, source = patch(tmp_path, model(), after)
    report = convert(source, tmp_path / "out.sdelta", base=base)
    assert "tensor 'b.weight': float32 values become bfloat16, as the base" in report.notes
    dk.merge(base, dk.load(tmp_path / "out.sdelta"), tmp_path / "merged")
    weightscope.apply_patch(source, str(base), tmp_path / "applied.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert equal(merged, load_file(tmp_path / "applied.safetensors"))


def test_another_base_is_refused(tmp_path: Path) -> None:
    _, source = patch(tmp_path, model(), tuned())
    other = model()
    other["a.weight"][0, 0] += 1  # where the patch has no entry
    with pytest.raises(BaseMismatchError, match=r"tensor 'a\.weight' has sha256"):
        convert(source, tmp_path / "out.sdelta", base=write(tmp_path / "other", other))


def test_what_a_patch_cannot_hold(tmp_path: Path) -> None:
    base = write(tmp_path / "base", model())
    for extra, message in [
        ({"x": np.ones(3)}, "cannot hold 'x'"),
        ({"a.weight[8:]": np.ones((2, 12), np.float32)}, "no rows appended"),
        ({"a.weight": np.ones((8, 12))}, "keeps dtype and shape"),
    ]:
        dk.save(dk.SparseDelta(tensors={}, extras=extra), tmp_path / "d.sdelta")
        with pytest.raises(DeltakitError, match=message):
            convert(tmp_path / "d.sdelta", tmp_path / "p.wsp", to_format="weightscope", base=base)
        assert not (tmp_path / "p.wsp").exists()
    with pytest.raises(ConfigError, match="digests of the base's tensors; give the base"):
        convert(tmp_path / "d.sdelta", tmp_path / "p.wsp", to_format="weightscope")


def forge(
    source: Path, edit: Callable[[dict[str, Any]], object], blob: Callable[[bytes], bytes] = bytes
) -> Path:
    """The patch with an edited header and an edited stream."""
    data = source.read_bytes()
    size = 8 + int.from_bytes(data[4:8], "little")
    header = json.loads(data[8:size])
    edit(header)
    text = json.dumps(header).encode()
    stream = zstandard.compress(blob(zstandard.decompress(data[size:])))
    out = source.with_name("forged.wsp")
    out.write_bytes(b"WSP2" + len(text).to_bytes(4, "little") + text + stream)
    return out


def first(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["tensors"][0].update(fields)


ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version": (lambda h: h.update(version="0.9"), "version '0.9', expected '0.2'"),
    "no tensors": (lambda h: h.pop("tensors"), "lists no tensors"),
    "a field": (lambda h: h["tensors"][0].pop("shape"), "lacks a field"),
    "no record": (lambda h: h["tensors"].insert(0, 3), "lacks a field"),
    "twice": (lambda h: h["tensors"].append(h["tensors"][0]), "stands twice"),
    "kind": (first(kind="xor"), "kind 'xor'"),
    "dtype": (first(dtype="float4"), "dtype 'float4'"),
    "negative": (first(blob_offset=-8), "integers from 0"),
    "offset": (first(blob_offset=8), "begins at byte 8 of the stream, expected 0"),
    "size": (first(blob_size=2**40), "found 1099511627776"),
    "count": (first(n_changed=97, blob_size=97 * 8), "97 values of shape"),
    "width": (first(index_width=2), "indices of 2 bytes"),
    "shape": (first(shape=[2**62, 2**62, 2**62]), "is not possible"),
    "shapes": (first(shape=[1] * 1000), "integers from 0"),
    "small": (first(shape=[2, 12]), "out of range"),
    "large": (
        lambda h: h["tensors"].append(
            {"kind": "new", "name": "x", "shape": [2**40], "dtype": "int8"}
            | {"blob_offset": sum(r["blob_size"] for r in h["tensors"]), "blob_size": 2**40}
        ),
        f"the stream ends {2**40} bytes early",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_forged_headers_are_refused(tmp_path: Path, attack: str) -> None:
    edit, message = ATTACKS[attack]
    _, source = patch(tmp_path, model(), tuned())
    with pytest.raises(DeltakitError, match=message) as caught:
        convert(forge(source, edit), tmp_path / "out.sdelta", from_format="weightscope")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (lambda b: b[:-1], "the stream ends 1 bytes early"),
        (lambda b: b + b"x", "goes on behind the last tensor"),
        (lambda b: b[:4] * 2 + b[8:], "stands twice"),
        (lambda b: b"\xff" * 4 + b[4:], "out of range"),
    ],
)
def test_forged_streams_are_refused(
    tmp_path: Path, blob: Callable[[bytes], bytes], message: str
) -> None:
    _, source = patch(tmp_path, model(), tuned())
    with pytest.raises(DeltakitError, match=message):
        convert(forge(source, lambda header: None, blob), tmp_path / "out.sdelta")


def test_truncated_and_damaged_files_are_refused(tmp_path: Path) -> None:
    _, source = patch(tmp_path, model(), tuned())
    data = source.read_bytes()
    for size in (3, 7, 40, len(data) - 20):
        source.write_bytes(data[:size])
        with pytest.raises(DeltakitError) as caught:
            convert(source, tmp_path / "out.sdelta", from_format="weightscope")
        assert "\n" not in str(caught.value)
    source.write_bytes(data[:-30] + bytes(30))
    with pytest.raises(DeltakitError, match="stream"):
        convert(source, tmp_path / "out.sdelta")
