"""The commands and the Python of a card work as they stand, for the repository they stand in."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from hub_server import HubServer
from train_lab import deltakit, train_flags

import deltakit as dk
from deltakit.publishing.card import card_text
from deltakit.publishing.contents import gather

BLOCKS = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def publish(hub: HubServer, source: Path) -> str:
    """Put the deltas of a file or a run on the Hub as org/news, with their card."""
    found = gather([source])
    card = card_text(
        found.deltas,
        repo_id="org/news",
        metrics=found.metrics,
        settings=found.settings,
        previous=None,
    )
    files = {name: path.read_bytes() for name, path in found.deltas.items()}
    hub.add("org/news", {**files, "README.md": card.encode()})
    return card


def run_all(card: str, hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run every block of the card in `folder`; returns the names of the commands."""
    monkeypatch.chdir(folder)
    names, python = [], ""
    for kind, block in BLOCKS.findall(card):
        if kind == "python":
            python += block
            continue
        for line in block.splitlines():
            program, *words = shlex.split(line, comments=True)
            assert program == "deltakit"
            done = deltakit(*words)
            assert done.exit_code == 0, f"{line}\n{done.output}"
            names.append(words[0])
    home = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hf")}
    home |= {"PYTHONPATH": str(Path(dk.__file__).parents[1]), "HF_HUB_DISABLE_XET": "1"}
    python += "\nimport sys; sys.exit(0)\n"
    subprocess.run(
        [sys.executable, "-c", python], cwd=folder, env={**os.environ, **home}, check=True
    )
    return names


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """The folder of somebody who has nothing but the card."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def test_a_family_of_a_base_on_the_hub(
    hub: HubServer,
    bert: Path,
    colours: Path,
    tmp_path: Path,
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a new head, a budget checkpoint, and the base found by what the delta records."""
    hub.add("org/bert", {path.name: path.read_bytes() for path in bert.iterdir()})
    flags = {"epochs": 1, "checkpoint_budgets": 200, "unmask_fraction": 1}
    done = deltakit("train", *train_flags("hf://org/bert", colours, tmp_path / "run", **flags))
    assert done.exit_code == 0, done.output
    card = publish(hub, tmp_path / "run")
    names = run_all(card, hub, elsewhere, monkeypatch)
    assert names == ["inspect", "pull", "merge", "pull", "truncate", "stack"]
    assert card.count("AutoModelForSequenceClassification") == 2
    whole = dk.load(tmp_path / "run" / "delta.sdelta")
    assert dk.load("news.sdelta").equals(whole)
    assert dk.load("smaller.sdelta").nnz == 150
    assert dk.load("stacked.sdelta").nnz == 300
    dk.merge(bert, [whole], tmp_path / "merged")
    merged = (elsewhere / "news-merged" / "model.safetensors").read_bytes()
    assert merged == (tmp_path / "merged" / "model.safetensors").read_bytes()


def test_an_exact_difference_without_base_values(
    hub: HubServer, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a base that is not on the Hub, by a file of another name than the usual one."""
    base = tiny_models.write_gpt2(elsewhere / "gpt2")
    tuned = tiny_models.write_gpt2(tmp_path / "tuned")
    path = tuned / "model.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-400:] = np.linspace(1, 2, 100, dtype=np.float32).tobytes()
    path.write_bytes(changed)
    delta = dk.diff(base, tuned)
    assert delta.base is not None
    named = replace(delta, base=replace(delta.base, model_id="gpt2"))
    dk.save(named, tmp_path / "news.sdelta", base_values=False)
    card = publish(hub, tmp_path / "news.sdelta")
    names = run_all(card, hub, elsewhere, monkeypatch)
    assert names == ["inspect", "pull", "merge", "truncate", "stack"]
    assert (elsewhere / "news-merged" / "model.safetensors").read_bytes() == path.read_bytes()


def test_a_delta_trained_in_another_dtype(
    hub: HubServer, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merging gives the trained bits, and a live model is loaded in the dtype of training."""
    llama = tiny_models.write_llama(tmp_path / "llama")
    hub.add("org/llama", {path.name: path.read_bytes() for path in llama.iterdir()})
    rows = [{"prompt": "the red", "completion": "cat runs"}] * 8
    data = tiny_models.write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = {"task": "causal-lm", "dtype": "bfloat16", "epochs": 1}
    flags |= {"eval_strategy": "no", "validation_fraction": 0}
    done = deltakit("train", *train_flags("hf://org/llama", data, tmp_path / "run", **flags))
    assert done.exit_code == 0, done.output
    card = publish(hub, tmp_path / "run" / "delta.sdelta")
    assert "--dtype trained" in card
    assert 'dtype="bfloat16"' in card
    names = run_all(card, hub, elsewhere, monkeypatch)
    assert names == ["inspect", "pull", "merge", "truncate", "stack"]


def test_a_delta_of_an_adapter(
    hub: HubServer,
    bert: Path,
    colours: Path,
    tmp_path: Path,
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is named as one, and what is not defined for adapters is not offered."""
    hub.add("org/bert", {path.name: path.read_bytes() for path in bert.iterdir()})
    flags = {"epochs": 1, "adapter": "lora"}
    done = deltakit("train", *train_flags("hf://org/bert", colours, tmp_path / "run", **flags))
    assert done.exit_code == 0, done.output
    card = publish(hub, tmp_path / "run" / "delta.sdelta")
    assert "A sparse delta of `lora` adapters to `org/bert`" in card
    names = run_all(card, hub, elsewhere, monkeypatch)
    assert names == ["inspect", "pull", "merge", "truncate"]
