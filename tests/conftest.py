"""What all tests share: no network, quiet libraries, small synthetic checkpoints."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["NO_COLOR"] = "1"

import numpy as np
import pytest
from hypothesis import settings
from safetensors.numpy import save_file

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta import save
from deltakit.identity import identify

# Machines under load must not make a test fail, and CI must try the same examples every time.
settings.register_profile("deltakit", deadline=None, derandomize=True)
settings.load_profile("deltakit")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A base of one file with the float32 tensors `w` [20, 30], `b` [20] and `e` [0]."""
    return Checkpoint(write_base(tmp_path / "base.safetensors", seed=0))


@pytest.fixture
def other_checkpoint(tmp_path: Path) -> Checkpoint:
    """A base like `checkpoint`, with other values."""
    return Checkpoint(write_base(tmp_path / "other.safetensors", seed=1))


def write_base(path: Path, seed: int) -> Path:
    """Write the checkpoint of the fixtures above."""
    random = np.random.default_rng(seed)
    tensors = {
        "w": random.standard_normal((20, 30), np.float32),
        "b": random.standard_normal(20, np.float32),
        "e": np.zeros(0, np.float32),
    }
    save_file(tensors, path)
    return path


@pytest.fixture
def delta_file(tmp_path: Path, checkpoint: Checkpoint) -> Path:
    """`delta.sdelta` beside the base of `checkpoint`: 100 entries in `w`, 10 in `b`, with order."""
    random = np.random.default_rng(2)
    tensors = {}
    for name, count in (("w", 100), ("b", 10)):
        info = checkpoint.tensors[name]
        tensors[name] = TensorDelta(
            name=name,
            shape=info.shape,
            dtype="float32",
            mode="add",
            indices=np.sort(random.choice(info.numel, count, replace=False)),
            values=random.standard_normal(count).astype(np.float32),
            order=random.integers(0, 1000, count),
        )
    base = identify(checkpoint, {name: tensor.indices for name, tensor in tensors.items()})
    delta = SparseDelta(
        tensors=tensors, base=replace(base, model_id="org/base"), provenance={"task": "news"}
    )
    path = tmp_path / "delta.sdelta"
    save(delta, path)
    return path
