"""What the tests of merging by recorded identity share: a base in shards, and its delta."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import write_sharded
from click.testing import CliRunner
from hub_server import HubServer
from huggingface_hub import constants

import deltakit as dk
from deltakit.cli.main import main
from deltakit.formats.checkpoint import Checkpoint
from deltakit.hub import failures
from deltakit.identity import identify

ROOT = Path(__file__).resolve().parents[1]
SHARDS = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]


def go_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder that holds nothing; nobody waits before trying again."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(failures.time, "sleep", lambda seconds: None)


def write_base(folder: Path, seed: int = 0) -> Path:
    """Three shards of two tensors each, w0 to w5 [40, 30], and what belongs to a model."""
    random = np.random.default_rng(seed)
    arrays = [random.standard_normal((40, 30)).astype(np.float32) for _ in range(6)]
    shards = [{f"w{n}": arrays[n] for n in pair} for pair in ((0, 1), (2, 3), (4, 5))]
    write_sharded(folder, list(shards), {"model_type": "bert", "num_labels": 2})
    (folder / "tokenizer.json").write_text("{}")
    return folder


def commit_of(hub: HubServer) -> str:
    """The newest commit of the base."""
    return hub.repos["model", "org/base"].refs["main"]


def delta_of(base: Path, revision: str | None, model_id: str | None = "org/base") -> dk.SparseDelta:
    """20 entries in each of w0, w2 and w5, a new head, and the base that they record."""
    random = np.random.default_rng(1)
    tensors = {
        name: dk.TensorDelta(
            name=name,
            shape=(40, 30),
            dtype="float32",
            mode="add",
            indices=np.sort(random.choice(1200, 20, replace=False)),
            values=random.standard_normal(20).astype(np.float32),
            trained_dtype="bfloat16",
        )
        for name in ("w0", "w2", "w5")
    }
    touched = {name: tensor.indices for name, tensor in tensors.items()}
    identity = identify(Checkpoint(base), touched, dict.fromkeys(tensors, "bfloat16"))
    return dk.SparseDelta(
        tensors=tensors,
        extras={"head.weight": np.ones((3, 30), np.float32)},
        base=replace(identity, model_id=model_id, revision=revision),
        config={"num_labels": 3},
    )


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `deltakit ARGUMENTS`, in this process."""
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


def contents(folder: str | Path) -> dict[str, bytes]:
    """Name -> bytes of the files in a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def cached() -> list[str]:
    """The weight files that the cache holds."""
    found = Path(constants.HF_HUB_CACHE).rglob("snapshots/**/*.safetensors")
    return sorted(path.name for path in found if path.is_file())


def objects() -> int:
    """Large files whose bytes the cache holds."""
    blobs = Path(constants.HF_HUB_CACHE).rglob("blobs/*")
    return sum(path.is_file() and path.stat().st_size > 4000 for path in blobs)


def saved(delta: dk.SparseDelta) -> str:
    dk.save(delta, "a.sdelta")
    return "a.sdelta"
