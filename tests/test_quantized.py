"""Laws of merging onto quantised checkpoints: refused by default, or quantised again and counted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from bitsandbytes import functional
from checkpoint_factory import read_safetensors, write_safetensors, write_sharded
from click.testing import CliRunner
from merge_reference import adding, only
from safetensors.torch import load_file, save_file
from tiny_models import write_gpt2, write_llama

from deltakit.cli.main import main
from deltakit.delta import BaseIdentity, SparseDelta, TensorDelta
from deltakit.diffing.diff import diff
from deltakit.dtypes import Array
from deltakit.errors import (
    BaseMismatchError,
    ConfigError,
    CoordinateError,
    DeltaError,
    FormatError,
)
from deltakit.formats.sdelta import save
from deltakit.in_place.merge import merge_in_place
from deltakit.merging.merge import merge

Tensors = dict[str, torch.Tensor]
SCHEMES = ("nf4", "nf4-double", "fp4", "int8")
SHAPE = (90, 200)  # several blocks of 64, the last one short, and two blocks of scales


def quantize(scheme: str, weight: torch.Tensor, name: str = "w.weight") -> Tensors:
    """The tensors that bitsandbytes' linear layers store for `weight`."""
    if scheme == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return {name: codes, name.removesuffix("weight") + "SCB": scales}
    kind, _, double = scheme.partition("-")
    codes, state = functional.quantize_4bit(
        weight, quant_type=kind, compress_statistics=bool(double)
    )
    return {name: codes} | {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}


def dequantize(stored: Tensors, name: str = "w.weight") -> torch.Tensor:
    """The weight that bitsandbytes reads in stored tensors."""
    if name.removesuffix("weight") + "SCB" in stored:
        scales = stored[name.removesuffix("weight") + "SCB"]
        return functional.int8_vectorwise_dequant(stored[name], scales)
    parts = {k: v for k, v in stored.items() if k.startswith(f"{name}.")}
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    return functional.dequantize_4bit(stored[name], state)


def written(path: Path, scheme: str, shape: tuple[int, ...] = SHAPE) -> Path:
    """A file with the quantised tensor "w.weight" and the plain one "norm.weight", bfloat16."""
    torch.manual_seed(0)
    stored = quantize(scheme, (0.02 * torch.randn(shape)).bfloat16())
    save_file({**stored, "norm.weight": torch.ones(7, dtype=torch.bfloat16)}, path)
    return path


def entries(
    std: float, count: int = 60, dtype: Any = ml_dtypes.bfloat16, shape: tuple[int, ...] = SHAPE
) -> TensorDelta:
    rng = np.random.default_rng(3)
    found = adding("w.weight", np.zeros(shape, dtype), rng, count)
    return TensorDelta(
        name="w.weight",
        shape=shape,
        dtype=found.dtype,
        mode="add",
        indices=found.indices,
        values=found.values * std,
    )


def plus(weight: torch.Tensor, delta: TensorDelta, dtype: torch.dtype) -> torch.Tensor:
    """The entries of a dense weight, cast to `dtype`, with the delta added in float32."""
    flat, at = weight.clone().reshape(-1), torch.from_numpy(delta.indices)
    summed = flat[at].to(dtype).float() + torch.from_numpy(delta.values)
    flat[at] = summed.to(dtype).to(flat.dtype)
    return flat.reshape(weight.shape)


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


@pytest.mark.parametrize("scheme", SCHEMES)
def test_refused_in_one_line(tmp_path: Path, scheme: str) -> None:
    base = written(tmp_path / "base.safetensors", scheme)
    delta = only(entries(1e-3), base=BaseIdentity(model_id="owner/model"))
    how = f"bitsandbytes {scheme.partition('-')[0]}"
    expected = (
        f"delta 0: tensor 'w.weight' is quantised in {base} ({how}), and rounding it again loses "
        "most of a small delta; merge into the full-precision base, owner/model, or into a new "
        "file with --requantize (requantize=True), which counts the entries that survive"
    )
    before = base.read_bytes()
    attempts: list[Callable[[], Any]] = [
        lambda: merge(base, delta, tmp_path / "out.safetensors", allow_base_mismatch=True),
        lambda: merge(base, [delta, delta], tmp_path / "out.safetensors", method="ties"),
        lambda: merge_in_place(base, delta, allow_base_mismatch=True),
    ]
    for attempt in attempts:
        with pytest.raises(BaseMismatchError) as error:
            attempt()
        assert str(error.value) == expected
    assert base.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == [base.name]


def test_on_the_command_line(tmp_path: Path) -> None:
    base = written(tmp_path / "base.safetensors", "nf4")
    save(only(entries(0.01)), tmp_path / "d.sdelta")
    paths = [str(base), str(tmp_path / "d.sdelta")]
    both = CliRunner().invoke(main, ["merge", *paths, "--requantize", "--in-place"])
    assert both.exit_code == 2 and "--requantize does not go with --in-place" in both.output
    out = tmp_path / "out.safetensors"
    done = CliRunner().invoke(main, ["merge", *paths, "--requantize", "--json", "-o", str(out)])
    assert done.exit_code == 0 and out.exists()
    report = json.loads(done.stdout)
    survival = report["survival"]
    assert survival["entries"] == 60 and 0 < survival["survived"] <= 60
    counted = f"{survival['survived']} of 60 entries in 1 quantised tensors survive"
    assert counted in done.stderr
    assert "do not show whether it is the right one" in done.stderr


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


def test_plain_tensors_merge_as_ever(tmp_path: Path) -> None:
    base = written(tmp_path / "base.safetensors", "nf4-double")
    norm = np.ones(7, ml_dtypes.bfloat16)
    delta = adding("norm.weight", norm, np.random.default_rng(0), 3)
    for requantize in (False, True):
        out = tmp_path / f"{requantize}.safetensors"
        report = merge(base, only(delta), out, requantize=requantize)
        assert report.survival is None
        before, after = read_safetensors(base), read_safetensors(out)
        assert before.pop("norm.weight") != after.pop("norm.weight")
        assert before == after


@pytest.mark.parametrize("scheme", SCHEMES)
def test_differences_of_quantised_checkpoints_are_codes(tmp_path: Path, scheme: str) -> None:
    """They need no quantising again, and merge byte for byte; in place too."""
    base = written(tmp_path / "base.safetensors", scheme)
    merge(base, only(entries(0.05)), tmp_path / "tuned.safetensors", requantize=True)
    delta = diff(base, tmp_path / "tuned.safetensors")
    assert delta.nnz and {t.mode for t in delta.tensors.values()} == {"set"}
    merge(base, delta, tmp_path / "out.safetensors")
    tuned = (tmp_path / "tuned.safetensors").read_bytes()
    assert (tmp_path / "out.safetensors").read_bytes() == tuned
    merge_in_place(base, delta)
    assert base.read_bytes() == tuned
    with pytest.raises(DeltaError, match="changes its statistics 'w"):
        merge(
            tmp_path / "out.safetensors",
            [only(entries(0.01)), _without(delta, "w.weight")],
            tmp_path / "both.safetensors",
            requantize=True,
            allow_base_mismatch=True,
        )


def _without(delta: SparseDelta, name: str) -> SparseDelta:
    return SparseDelta(tensors={n: t for n, t in delta.tensors.items() if n != name})


@pytest.mark.parametrize("scale", ["w.weight_scale_inv", "w.weight_scale", "w.scale_weight"])
def test_scaled_float8(tmp_path: Path, scale: str) -> None:
    """`add` is refused, quantised again or not; `set` of the bits merges byte for byte."""
    rng = np.random.default_rng(4)
    files = []
    for name in ("base", "tuned"):
        weight = rng.standard_normal((12, 16)).astype(ml_dtypes.float8_e4m3fn)
        tensors: dict[str, Array] = {"w.weight": weight, scale: np.array([rng.random()], "<f4")}
        files.append(write_safetensors(tmp_path / f"{name}.safetensors", tensors))
    base, tuned = files
    delta = entries(0.01, shape=(12, 16))
    for requantize in (False, True):
        with pytest.raises(BaseMismatchError) as error:
            merge(base, only(delta), tmp_path / "out.safetensors", requantize=requantize)
        assert str(error.value) == (
            f"delta 0: tensor 'w.weight' is quantised in {base} (float8_e4m3fn in units of "
            f"{scale!r}), so entries would have to be in units of the scale, too; merge into the "
            "full-precision base"
        )
    merge(base, diff(base, tuned), tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == tuned.read_bytes()
    with pytest.raises(ConfigError, match=r"would convert what tensor 'w\.weight' is quantised by"):
        merge(base, only(), tmp_path / "cast.safetensors", dtype="bfloat16")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = written(tmp_path / "base.safetensors", "nf4")
    out = tmp_path / "out.safetensors"
    with pytest.raises(CoordinateError, match=r"shape \[200, 90\] in the delta and had shape \[90"):
        merge(base, only(entries(0.01, shape=(200, 90))), out, requantize=True)
    with pytest.raises(BaseMismatchError, match="made for bfloat16 and float32"):
        merge(
            base,
            [only(entries(0.01)), only(entries(0.01, dtype=np.float32))],
            out,
            requantize=True,
        )
    with pytest.raises(DeltaError, match="not finite or too large for"):
        merge(base, only(entries(1e38)), out, weights=[1e3], requantize=True)
    whole = np.zeros(SHAPE, np.float32)
    with pytest.raises(BaseMismatchError, match=r"extra 'w\.weight' is float32, in .* quantised"):
        merge(base, only(extras={"w.weight": whole}), out, requantize=True)
    stored = load_file(base)
    stored["w.weight.absmax"] = stored["w.weight.absmax"][:-1].clone()
    save_file(stored, tmp_path / "short.safetensors")
    with pytest.raises(FormatError, match=r"do not fit; expected .absmax of 282 float32"):
        merge(tmp_path / "short.safetensors", only(entries(0.01)), out, requantize=True)
    assert not out.exists()


@pytest.mark.parametrize("scheme", ["nf4-double", "fp4", "int8"])
def test_folders_of_transformers(tmp_path: Path, scheme: str) -> None:
    """A model that transformers saved quantised is merged into, and read back as predicted."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if scheme == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=scheme[:3],
            bnb_4bit_use_double_quant=scheme.endswith("double"),
        )
    )
    plain, base, out = (tmp_path / name for name in ("plain", "base", "out"))
    model = AutoModelForCausalLM.from_pretrained(
        write_llama(plain), quantization_config=settings, dtype=torch.bfloat16
    )
    model.save_pretrained(base)
    name = "model.layers.1.mlp.down_proj.weight"
    delta = adding(name, np.zeros((16, 32), ml_dtypes.bfloat16), np.random.default_rng(1), 20)
    with pytest.raises(BaseMismatchError, match=f"bitsandbytes {scheme[:3]}"):
        merge(base, only(delta), out)
    report = merge(base, only(delta), out, requantize=True)
    before, after = (load_file(each / "model.safetensors") for each in (base, out))
    weight, merged = dequantize(dict(before), name), dequantize(dict(after), name)
    assert report.survival is not None
    moved = (weight != merged).reshape(-1)
    assert report.survival.survived == int(moved[torch.from_numpy(delta.indices)].sum()) > 0
    read = AutoModelForCausalLM.from_pretrained(out)
    layer = read.model.layers[1].mlp.down_proj
    assert torch.equal(dequantize(dict(layer.state_dict(prefix="w."))), merged)
    assert torch.isfinite(read(torch.arange(6)[None]).logits).all()


def test_transposed_layers_are_refused(tmp_path: Path) -> None:
    """transformers quantises Conv1D weights transposed; of a square one the shape does not tell."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain, base = tmp_path / "plain", tmp_path / "base"
    settings = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(write_gpt2(plain), quantization_config=settings)
    model.save_pretrained(base)
    zeros = np.zeros((16, 16), np.float32)
    delta = adding("transformer.h.0.attn.c_proj.weight", zeros, np.random.default_rng(0), 5)
    with pytest.raises(CoordinateError, match="quantised transposed"):
        merge(base, only(delta), tmp_path / "out", requantize=True)


def test_plain_merging_imports_no_torch(tmp_path: Path) -> None:
    """Neither does the refusal; without torch the option says what to install."""
    base = written(tmp_path / "base.safetensors", "nf4")
    save(only(entries(0.01)), tmp_path / "d.sdelta")
    code = f"""
import sys
import deltakit as dk
from deltakit.errors import BaseMismatchError, ConfigError
paths = {str(base)!r}, {str(tmp_path / "d.sdelta")!r}, {str(tmp_path / "o.safetensors")!r}
try:
    dk.merge(*paths)
except BaseMismatchError:
    print("torch" in sys.modules)
sys.modules["torch"] = None
try:
    dk.merge(*paths, requantize=True)
except ConfigError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    torch_imported, told = ran.stdout.splitlines()
    assert torch_imported == "False"
    assert told == (
        "--requantize (requantize=True) needs torch, which is not installed; "
        "pip install 'deltakit-sparse[train,8bit]'"
    )
