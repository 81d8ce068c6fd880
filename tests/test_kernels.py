"""Triton's kernels without a device: interpreted, and compiled for devices that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deltakit.kernels import dispatch
from deltakit.training.gradient_path import product_path

HERE = Path(__file__).parent


def interpreted(*tests: str, **environment: str) -> None:
    """Run tests in a process in which CPU tensors play the device's part."""
    paths = [str(HERE / test) for test in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **environment}
    environment = {**os.environ, **settings}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    interpreted("interpreted_kernels.py")


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_steps_on_a_device_without_one(kernels: str) -> None:
    """The path of a device, by torch alone and by interpreted kernels."""
    if kernels == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    mixed = "test_batched.py::test_few_and_many_entries"
    interpreted("device_path.py", mixed, DELTAKIT_KERNELS=kernels)


WITHOUT_TRITON = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refused())
import torch, deltakit as dk

for method in (dk.RandomMask(budget=9, seed=0), dk.ID3(budget=9, steps=2)):
    model = torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 8))
    tuner = dk.SparseTuner(model, method)
    for _ in range(3):
        model(torch.arange(9)).square().sum().backward()
        tuner.step()
kernels = [name for name in sys.modules if name.startswith("deltakit.kernels.")]
assert kernels == ["deltakit.kernels.dispatch"], kernels
"""


def test_cpus_need_no_triton() -> None:
    """A fixed support and a selection where it cannot be imported, and no kernel is."""
    clean = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True, env=clean)


def test_where_kernels_do_not_run_torch_takes_over_and_says_so() -> None:
    """Such as on a CPU that nobody interprets for."""
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.warns(UserWarning, match=r"do not run on cpu .*; torch's functions take their"):
        assert not dispatch._works(torch.device("cpu"))
    dispatch._works.cache_clear()


def test_sampled_products_pay_later_on_devices() -> None:
    """By the reckoned costs: a quarter of a percent in 16 bits, and never for small matrices."""
    everywhere = {"rows": 4096, "columns": 4096, "on_cpu": False}
    for bits, crossover in ((32, 0.0244), (16, 0.0026)):
        below, above = (round(4096**2 * crossover * f) for f in (0.9, 1.1))
        assert product_path((4096, 4096), below, **everywhere, bits=bits) == "sampled"
        assert product_path((4096, 4096), above, **everywhere, bits=bits) == "dense"
    assert product_path((512, 512), 10, 10, 10, bits=16, on_cpu=False) == "dense"
    assert product_path((4096, 4096), 64 * 64, 64, 64, bits=16, on_cpu=False) == "submatrix"


def test_torch_can_be_told_to_do_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    for switch, expected in (("torch", False), ("triton", True)):
        monkeypatch.setenv("DELTAKIT_KERNELS", switch)
        dispatch._has_triton.cache_clear()
        assert dispatch._has_triton() == expected
    dispatch._has_triton.cache_clear()
    assert not dispatch.by_triton(torch.zeros(1)) and not dispatch.runs_ahead(torch.zeros(1))


POINTERS = {"b": "*bf16", "h": "*fp16", "f": "*fp32", "i": "*i32", "l": "*i64", "F": "fp32"}


def _compiled(
    kernel: Any,
    types: str,
    capability: int,
    *,
    fuse: bool,
    ones: Collection[str] = (),
    aligned: Collection[str] = (),
    **constants: int,
) -> Any:
    """A kernel as `launch` has it compiled, to machine code, by the assembler that Triton carries.

    types: of the first arguments, pointers to bfloat16 (b), float16 (h), float32 (f), int32 (i) or
    int64 (l), and float32 (F); the others are int32. Triton compiles anew for integers that are 1
    (`ones`), and for pointers and integers that are multiples of 16 (`aligned`).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants |= dict.fromkeys(ones, 1)
    names = [name for name in kernel.arg_names if name not in constants]
    kinds = [POINTERS[kind] for kind in types]
    kinds += ["i32"] * (len(names) - len(kinds))
    signature = dict(zip(names, kinds, strict=True)) | dict.fromkeys(constants, "constexpr")
    places = [(n,) for n, name in enumerate(kernel.arg_names) if name in aligned]
    source = ASTSource(
        kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs=constants,
        attrs={place: [["tt.divisibility", 16]] for place in places},
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": fuse})


def _kernels(x: str) -> Iterator[tuple[str, Any, str, dict[str, Any]]]:
    """Name, kernel, types and constants of all, for activations or weights of a dtype."""
    from deltakit.kernels import at_least, batched_rows, lookup, product, turn, write_through

    tile = {"entries": product.ENTRIES, "width": product.TOKENS, "steps": 13, "fuse": True}
    yield "product", product.product_kernel, f"{x}{x}iif", tile
    tile = {"entries": lookup.ENTRIES, "width": lookup.TOKENS, "steps": 17, "fuse": True}
    yield "lookup", lookup.lookup_kernel, f"ll{x}iif", tile
    tile = {"outputs": batched_rows.OUTPUTS, "width": batched_rows.TOKENS, "fuse": True}
    yield "rows", batched_rows.rows_kernel, f"{x}flllllf", tile
    block = {"block": write_through.BLOCK, "fuse": False}
    yield "write", write_through.write_kernel, f"{x}llff", block
    yield "turn", turn.turn_kernel, f"{x}{x}", {"tile": turn.TILE, "fuse": False}
    block = {"block": at_least.BLOCK, "fuse": False}
    yield "count", at_least.count_kernel, "fFl", block
    yield "take", at_least.take_kernel, "fFllf", block


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(("capability", "dtype"), [(80, "b"), (80, "h"), (80, "f"), (90, "b")])
def test_kernels_compile_for_devices(capability: int, dtype: str) -> None:
    """For A100 and H100; and the arithmetic that counts is there."""
    for name, kernel, types, constants in _kernels(dtype):
        if dtype in "hf" and name in ("count", "take"):
            continue  # they know float32 alone
        compiled = _compiled(kernel, types, capability, **constants)
        code = compiled.asm["ptx"]
        assert f".target sm_{capability}" in code and len(compiled.asm["cubin"]) > 1000, name
        assert not re.search(r"\b(atom|red)\.", code), f"{name}: order would be left to chance"
        assert ".ftz" not in code, f"{name}: subnormal numbers would become zero"
        if not constants["fuse"]:
            assert "fma." not in code, f"{name}: fused"
        if name == "write":
            assert re.search(r"\badd\.(rn\.)?f32", code), f"{name}: sums are not float32"
            assert dtype != "h" or re.search(r"cvt\.rn\.f16(x2)?\.f32", code)


@pytest.mark.usefixtures("own_cache")
def test_kernels_compile_where_every_size_is_one() -> None:
    for _, kernel, types, constants in _kernels("b"):
        ones = kernel.arg_names[len(types) : len(kernel.arg_names) - len(constants) + 1]
        _compiled(kernel, types, 80, ones=ones, **constants)


@pytest.mark.usefixtures("own_cache")
def test_lines_are_read_in_vectors() -> None:
    """Of 16 bytes: transposed activations by the product, and what is transposed on both sides."""
    kernels = {name: rest for name, *rest in _kernels("b")}
    kernel, types, constants = kernels["product"]
    aligned = {"left", "right", "left_feature", "right_feature", "share", "tokens"}
    ones = {"left_token", "right_token"}
    code = _compiled(kernel, types, 90, ones=ones, aligned=aligned, **constants).asm["ptx"]
    assert code.count("ld.global.v4.b32") == 4  # 8 of 16 tokens of left and of right, twice
    kernel, types, constants = kernels["turn"]
    aligned = {"source", "target", "row", "width", "line"}
    code = _compiled(kernel, types, 90, ones={"column"}, aligned=aligned, **constants).asm["ptx"]
    assert "ld.global.v4.b32" in code and "st.global.v4.b32" in code
