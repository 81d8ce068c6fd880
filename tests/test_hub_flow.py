"""From training to a model that others load, through the command line and a Hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from hub_server import HubServer
from huggingface_hub import ModelCard, constants
from push_lab import OTHERS, TOKEN, files, log_in
from safetensors.numpy import load_file
from tiny_models import colour_rows, write_jsonl
from train_lab import deltakit, evaluated, train_flags

import deltakit as dk

# The client uploads with an argument that its own HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

OBJECT = "GET /object/"
LARGE = 20_000_000  # bytes of the values of a large delta
LOAD = """
import sys
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained("org/news-merged")
AutoTokenizer.from_pretrained("org/news-merged")
save_file(dict(model.state_dict()), sys.argv[1])
"""


@pytest.fixture
def writer(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A Hub with the user "org" logged in."""
    return log_in(hub, monkeypatch)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of another person, on another machine: nothing is in the cache."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def large_delta(tmp_path: Path) -> Path:
    """A delta file of more than 20 MB."""
    count = LARGE // 4
    random = np.random.default_rng(0)
    indices = np.cumsum(random.integers(1, 40, count))
    tensor = dk.TensorDelta(
        name="w",
        shape=(30_000, 10_000),
        dtype="float32",
        mode="add",
        indices=indices,
        values=random.standard_normal(count, np.float32),
    )
    path = tmp_path / "delta.sdelta"
    dk.save(dk.SparseDelta(tensors={"w": tensor}), path)
    assert path.stat().st_size > LARGE
    return path


def done(*arguments: Any) -> Result:
    """A command that succeeds."""
    result = deltakit(*arguments)
    assert result.exit_code == 0, result.output
    assert TOKEN not in result.output
    return result


def new_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another" / "hub"))


def test_train_push_inspect_pull_merge_push_load(
    writer: HubServer,
    bert: Path,
    tmp_path: Path,
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was evaluated in training is what others load by transformers, bit for bit."""
    writer.add("org/bert", {path.name: path.read_bytes() for path in bert.iterdir()})
    data, run = tmp_path / "colours", tmp_path / "run"
    data.mkdir()
    for seed, (split, count) in enumerate({"train": 60, "validation": 30}.items()):
        write_jsonl(data / f"{split}.jsonl", colour_rows(count, seed))
    marks = {"checkpoint_budgets": 150, "unmask_fraction": 1, "epochs": 1}
    done("train", *train_flags("hf://org/bert", data, run, **marks))
    done("push", run, "org/news", "--tag", "v1.0")
    published = files(writer)
    names = {"README.md", "best.sdelta", "budget-150.sdelta", "delta.sdelta"}
    assert set(published) == {*names, "config.yaml", "metrics.json"}
    card = ModelCard(published["README.md"].decode()).data
    assert card.base_model == "org/bert"
    final = json.loads((run / "metrics.json").read_text())["final"]["metrics"]
    assert {r.metric_name: r.metric_value for r in card.eval_results} == final

    new_machine(monkeypatch, tmp_path)
    assert "300 in 34 tensors" in done("inspect", "hf://org/news").stdout
    assert "config.yaml" not in "".join(p.name for p in (tmp_path / "another").rglob("*"))
    done("pull", "org/news", "--budget", 150, "-o", "small.sdelta")
    assert Path("small.sdelta").read_bytes() == published["budget-150.sdelta"]
    done("pull", "org/news", "--revision", "v1.0")
    assert Path("news.sdelta").read_bytes() == published["delta.sdelta"]

    done("merge", "hf://org/news", "-o", "merged")
    done("push", "merged", "org/news-merged", "--private")
    home = {"HF_ENDPOINT": writer.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    home |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    loaded = tmp_path / "loaded.safetensors"
    subprocess.run([sys.executable, "-c", LOAD, loaded], env={**os.environ, **home}, check=True)
    tensors, merged = load_file(loaded), load_file("merged/model.safetensors")
    assert {name.removeprefix("bert.") for name in tensors} == {
        name.removeprefix("bert.") for name in merged
    }
    for name, tensor in tensors.items():
        stored = merged.get(name, merged.get(name.removeprefix("bert.")))
        assert stored is not None
        assert tensor.tobytes() == stored.tobytes(), name

    flags = ["--data", data, "--task", "sequence-classification"]
    told = evaluated(tmp_path / "a.jsonl", "--model", "hf://org/news-merged", *flags)
    assert {name: told["metrics"][name] for name in final} == final
    evaluated(tmp_path / "b.jsonl", "--model", bert, "--delta", run / "delta.sdelta", *flags)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_private_repository(
    writer: HubServer, delta_file: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner has it, and for others there is none."""
    done("push", delta_file, "org/secret", "--private")
    for token in (OTHERS, None):
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        for command in ("inspect", "pull"):
            refused = deltakit(command, "hf://org/secret")
            assert refused.exit_code == 1
            assert "no repository org/secret; check the name, or log in" in refused.stderr
    assert list(elsewhere.iterdir()) == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done("pull", "org/secret")
    assert Path("secret.sdelta").read_bytes() == delta_file.read_bytes()


def test_a_large_delta_through_trouble(
    writer: HubServer,
    large_delta: Path,
    tmp_path: Path,
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It goes up in parts, is looked at for a few kB, and a dropped download goes on."""
    writer.chunk = 8_000_000
    done("push", large_delta, "org/news")
    assert len(writer.calls("PUT /part/")) == 3
    new_machine(monkeypatch, tmp_path)
    writer.seen.clear()
    done("inspect", "hf://org/news")
    assert sum(seen.sent for seen in writer.seen) < 100_000
    writer.seen.clear()
    writer.drop(OBJECT, after=15_000_000)
    done("pull", "org/news")
    assert Path("news.sdelta").read_bytes() == large_delta.read_bytes()
    first, second = [seen for seen in writer.seen if seen.call.startswith(OBJECT)]
    assert (first.sent, first.range) == (15_000_000, None)
    assert second.range is not None
    assert second.sent < large_delta.stat().st_size - 10_000_000


def test_two_people_push_at_once(writer: HubServer, delta_file: Path, tmp_path: Path) -> None:
    """The second one is told; nothing of the first is lost, and the push goes through when asked."""
    theirs = tmp_path / "theirs" / "delta.sdelta"
    theirs.parent.mkdir()
    dk.save(dk.truncate(dk.load(delta_file), 5), theirs)
    done("push", delta_file, "org/news")
    (tmp_path / "mine").mkdir()
    mine = tmp_path / "mine" / "delta.sdelta"
    dk.save(dk.truncate(dk.load(delta_file), 50), mine)
    writer.meanwhile(
        "POST /api/models/org/news/preupload/",
        lambda: writer.add("org/news", {"delta.sdelta": theirs.read_bytes()}),
    )
    refused = deltakit("push", mine, "org/news")
    assert refused.exit_code == 1
    assert "somebody else published delta.sdelta meanwhile" in refused.stderr
    assert files(writer)["delta.sdelta"] == theirs.read_bytes()
    done("push", mine, "org/news")
    assert files(writer)["delta.sdelta"] == mine.read_bytes()


def test_a_wrong_byte_on_the_way_is_refused(
    writer: HubServer,
    delta_file: Path,
    tmp_path: Path,
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The body has the right length; neither at the place nor in the cache anything is left."""
    done("push", delta_file, "org/news")
    new_machine(monkeypatch, tmp_path)
    writer.corrupt(OBJECT)
    refused = deltakit("pull", "org/news")
    assert refused.exit_code == 1
    assert "the Hub records" in refused.stderr
    assert list(elsewhere.iterdir()) == []
    assert [p.name for p in (tmp_path / "another").rglob("*.sdelta")] == []
    done("pull", "org/news")
    assert Path("news.sdelta").read_bytes() == delta_file.read_bytes()
