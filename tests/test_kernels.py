"""Triton's kernels without a device: interpreted, and compiled for devices that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deltakit.kernels import dispatch
from deltakit.training.gradient_path import product_path

HERE = Path(__file__).parent
TARGETS = {80: "bhf", 90: "b"}  # A100 and H100: compute capability -> dtypes of activations


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


def _signatures(dtypes: str) -> list[tuple[str, Any, str, dict[str, int], bool]]:
    """Kernels as they are launched: name, function, types of arguments, constants, fusion.

    Letters: b, h, f are pointers to bfloat16, float16, float32; i, l to int32, int64; I and F are
    numbers, int32 and float32.
    """
    from deltakit.kernels import at_least, batched_rows, lookup, product, turn, write_through

    tile = {"entries": product.ENTRIES, "width": product.TOKENS, "steps": 13}
    seen = {"entries": lookup.ENTRIES, "width": lookup.TOKENS, "steps": 17}
    part = {"outputs": batched_rows.OUTPUTS, "width": batched_rows.TOKENS}
    found: list[tuple[str, Any, str, dict[str, int], bool]] = []
    for x in dtypes:
        types = f"{x}{x}iifIIIIIIII"
        found.append((f"product-{x}", product.product_kernel, types, tile, True))
        found.append((f"lookup-{x}", lookup.lookup_kernel, f"ll{x}iifIIII", seen, True))
        types = f"{x}flllllfIIIIIII"
        found.append((f"rows-{x}", batched_rows.rows_kernel, types, part, True))
        block = {"block": write_through.BLOCK}
        found.append((f"write-{x}", write_through.write_kernel, f"{x}llffI", block, False))
        found.append((f"turn-{x}", turn.turn_kernel, f"{x}{x}IIII", {"tile": turn.TILE}, True))
    block = {"block": at_least.BLOCK}
    found.append(("count", at_least.count_kernel, "fFlI", block, False))
    found.append(("take", at_least.take_kernel, "fFllfI", block, False))
    return found


KINDS = {
    "b": "*bf16",
    "h": "*fp16",
    "f": "*fp32",
    "i": "*i32",
    "l": "*i64",
    "I": "i32",
    "F": "fp32",
}


@pytest.mark.parametrize("capability", TARGETS)
def test_kernels_compile_for_devices(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code, by the assembler that Triton carries; the arithmetic that counts is there."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, kernel, types, constants, fusion in _signatures(TARGETS[capability]):
        names = [each for each in kernel.arg_names if each not in constants]
        assert len(names) == len(types), name
        signature = dict(zip(names, (KINDS[kind] for kind in types), strict=True))
        signature |= dict.fromkeys(constants, "constexpr")
        compiled = triton.compile(
            ASTSource(kernel, signature=signature, constexprs=constants),
            target=GPUTarget("cuda", capability, 32),
            options={"enable_fp_fusion": fusion},
        )
        code = compiled.asm["ptx"]
        assert f".target sm_{capability}" in code and len(compiled.asm["cubin"]) > 1000, name
        assert not re.search(r"\b(atom|red)\.", code), f"{name}: order would be left to chance"
        assert ".ftz" not in code, f"{name}: subnormal numbers would become zero"
        if not fusion:
            assert "fma." not in code, f"{name}: fused"
        if name.startswith("write-"):
            assert re.search(r"\badd\.(rn\.)?f32", code), f"{name}: sums are not float32"
        if name == "write-h":
            assert "cvt.rn.f16.f32" in code or "cvt.rn.f16x2.f32" in code
