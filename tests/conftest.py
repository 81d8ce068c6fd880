"""What all tests share: no network, quiet libraries, small synthetic checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["NO_COLOR"] = "1"

import numpy as np
import pytest
from hypothesis import settings
from safetensors.numpy import save_file

from deltakit.formats.checkpoint import Checkpoint

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
