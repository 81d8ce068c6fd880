"""Laws of merging onto quantised checkpoints: refused by default, plain tensors and codes as ever."""

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
from checkpoint_factory import read_safetensors, write_safetensors
from click.testing import CliRunner
from merge_reference import adding, only
from quantized_lab import SCHEMES, SHAPE, entries, written
from safetensors.torch import load_file, save_file

from deltakit.cli.main import main
from deltakit.delta import BaseIdentity, SparseDelta
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
