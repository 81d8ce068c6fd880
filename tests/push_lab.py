"""What the tests of publishing share: a user with a token, a run's folder, a model's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hub_repos import Repo
from hub_server import HubServer
from safetensors.numpy import save_file

import deltakit as dk
from deltakit.cli.main import main
from deltakit.hub import failures

TOKEN = "hf_sEcReT0123456789"
OTHERS = "hf_oThErS0123456789"


def log_in(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The Hub, with the user "org" logged in; nobody waits before trying again."""
    hub.tokens |= {TOKEN: "org", OTHERS: "others"}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(failures.time, "sleep", lambda seconds: None)
    return hub


def write_run(folder: Path, delta_file: Path) -> Path:
    """The folder of a finished run: 110 entries in the end, the best too, and a mark at 40."""
    folder.mkdir(parents=True)
    shutil.copy(delta_file, folder / "delta.sdelta")
    shutil.copy(delta_file, folder / "best.sdelta")
    dk.save(dk.truncate(dk.load(delta_file), 40), folder / "budget-40.sdelta")

    (folder.parent / "news.jsonl").touch()

    def result(name: str, entries: int, accuracy: float) -> dict[str, object]:
        path = folder / name
        told = {"entries": entries, "step": 7, "metrics": {"accuracy": accuracy}}
        return {**told, "path": str(path), "bytes": path.stat().st_size}

    record = {
        "version": 1,
        "task": "text-classification",
        "method": "id3",
        "model": str(folder.parent / "base.safetensors"),
        "data": f"{folder.parent.name}/news.jsonl",
        "metric": "accuracy",
        "marks": [result("budget-40.sdelta", 40, 0.5)],
        "final": result("delta.sdelta", 110, 0.75),
        "log": f"read with {TOKEN}",
    }
    (folder / "metrics.json").write_text(json.dumps(record))
    settings = f"model: {folder.parent}/base.safetensors  # base model\ndata: /home/me/news.jsonl\n"
    (folder / "config.yaml").write_text(f"{settings}budget: 110\noutput_dir: runs/{folder.name}\n")
    return folder


def write_model(folder: Path) -> Path:
    """The folder of a model: weights, configuration, and files that are not to be published."""
    folder.mkdir()
    save_file({"w": np.arange(6, dtype=np.float32)}, folder / "model.safetensors")
    texts = {"config.json": "{}", "vocab.txt": "a", "chat_template.jinja": "", "LICENSE": "MIT"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "training_args.bin").write_bytes(b"\x80\x04")
    (folder / ".secret.json").write_text("{}")
    return folder


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `deltakit push ARGUMENTS`; no token is in either."""
    done = CliRunner().invoke(main, ["push", *map(str, arguments)])
    assert TOKEN not in done.output
    return done.exit_code, done.stdout, done.stderr


def files(hub: HubServer, repo: str = "org/news", revision: str = "main") -> dict[str, bytes]:
    """The content of a repository, by names."""
    return {name: blob.data for name, blob in repository(hub, repo).files(revision).items()}


def commits(hub: HubServer, repo: str = "org/news") -> int:
    """How many commits a repository has, its first empty one left out."""
    return len(repository(hub, repo).commits) - 1


def repository(hub: HubServer, name: str) -> Repo:
    """A model repository."""
    return hub.repos["model", name]
