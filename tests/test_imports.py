"""What is installed is whole, and what claims to be torch-free is.

Runs in a checkout like every other test, and again from another folder against the built wheel with
base dependencies only, so it needs nothing but pytest and deltakit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import deltakit

ROOT = Path(__file__).resolve().parents[1]  # the checkout
PACKAGE = Path(deltakit.__file__).parent  # what is tested: the checkout or what a wheel installed
FOLDERS = {"deltakit": PACKAGE, "cli": PACKAGE / "cli", "formats": PACKAGE / "formats"}
HEAVY = ["accelerate", "datasets", "huggingface_hub", "matplotlib", "scipy", "sklearn", "torch"]
HEAVY += ["transformers"]
# Training and live models work on torch modules; everything else does without.
TORCH = ("deltakit.selection", "deltakit.training", "deltakit.live")
TORCH += (
    "deltakit.adapters.attach",
    "deltakit.patching.states",
    "deltakit.patching.stream",
    "deltakit.patching.following",
)
PLAIN = {name: module for name, module in deltakit._EXPORTS.items() if not module.startswith(TORCH)}


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder that is not the checkout, with the deltakit under test importable."""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def loaded_after(code: str, cwd: Path) -> list[str]:
    """Which heavy libraries are in sys.modules after running `code`."""
    told = f"{code}\nimport sys, json; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = run("-c", told, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_every_file_of_the_checkout_is_installed() -> None:
    """Modules, the format's description, the type marker and the demo's data."""
    missing = []
    for name, installed in FOLDERS.items():
        for file in sorted((ROOT / name).rglob("*")):
            parts = file.relative_to(ROOT / name).parts
            if "__pycache__" in parts or not file.is_file():
                continue
            if not (installed / Path(*parts)).is_file():
                missing.append(f"{name}/{'/'.join(parts)}")
    assert missing == []


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    assert loaded_after("import deltakit", tmp_path) == []


def test_plain_names_load_nothing_heavy(tmp_path: Path) -> None:
    names = "".join(f"deltakit.{name}\n" for name in PLAIN)
    assert loaded_after(f"import deltakit\n{names}", tmp_path) == []


def test_help_loads_nothing_heavy_and_no_command(tmp_path: Path) -> None:
    code = (
        "import contextlib, io, sys\n"
        "from deltakit.cli.main import COMMANDS, main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "    main(['--help'], standalone_mode=False)\n"
        "assert all(name in out.getvalue() for name in COMMANDS), out.getvalue()\n"
        "assert not [e.module for e in COMMANDS.values() if e.module in sys.modules]\n"
        "assert 'numpy' not in sys.modules\n"
    )
    assert loaded_after(code, tmp_path) == []


def test_inspecting_a_file_loads_nothing_heavy(sample: Path) -> None:
    code = (
        "from deltakit.cli.main import main\n"
        f"main(['inspect', {str(sample)!r}], standalone_mode=False)"
    )
    assert loaded_after(code, sample.parent) == []


def test_reading_what_torch_distributed_saved_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "from deltakit.formats.checkpoint import Checkpoint\n"
        f"base = Checkpoint({str(ROOT / 'tests' / 'dcp' / 'torch-2.13')!r})\n"
        "assert base.read('weight').size == base.info('weight').numel == 15"
    )
    assert loaded_after(code, tmp_path) == []


@pytest.mark.parametrize("module", ["deltakit", "deltakit.cli"])
def test_modules_run_as_the_command(module: str, sample: Path) -> None:
    done = run("-m", module, "inspect", sample.name, cwd=sample.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("file     sample.sdelta (")


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A small delta file."""
    tensor = deltakit.TensorDelta(
        name="layer.0.weight",
        shape=(4, 5),
        dtype="bfloat16",
        mode="add",
        indices=np.array([1, 7, 19]),
        values=np.array([0.5, -1.0, 2.0], np.float32),
    )
    path = tmp_path / "sample.sdelta"
    deltakit.save(deltakit.SparseDelta(tensors={tensor.name: tensor}), path)
    return path
