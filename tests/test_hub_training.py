"""Training on a base of the Hub and evaluating a delta there, with transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import HubServer
from train_lab import deltakit, evaluated, train_flags

import deltakit as dk
from deltakit.errors import ConfigError, HubUnavailableError, MissingFileError
from deltakit.training.pretrained import locate, with_weights


@pytest.fixture
def published(hub: HubServer, bert: Path) -> HubServer:
    """A Hub with the tiny encoder as `org/bert`."""
    files = {path.name: path.read_bytes() for path in bert.iterdir()}
    hub.add("org/bert", {**files, "pytorch_model.bin": b"PK\x03\x04"})
    return hub


def test_a_delta_of_a_base_of_the_hub_knows_it_and_is_evaluated_there(
    published: HubServer, bert: Path, colours: Path, tmp_path: Path
) -> None:
    """The delta names repository and commit; logits are those of the local copies, bit for bit."""
    run = tmp_path / "run"
    done = deltakit("train", *train_flags("hf://org/bert@main", colours, run, epochs=1))
    assert done.exit_code == 0, done.output
    delta = dk.load(run / "delta.sdelta")
    assert delta.base is not None
    commit = published.repos["model", "org/bert"].refs["main"]
    assert (delta.base.model_id, delta.base.revision) == ("org/bert", commit)
    assert dk.verify(run / "delta.sdelta", bert).ok
    assert not published.calls("pytorch_model")
    published.add("org/red", {"delta.sdelta": (run / "delta.sdelta").read_bytes()})
    flags = ["--data", colours, "--task", "sequence-classification"]
    here = ["--model", bert, "--delta", run / "delta.sdelta", *flags]
    there = ["--model", "org/bert", "--delta", "hf://org/red", *flags]
    expected = evaluated(tmp_path / "a.jsonl", *here)
    names = {"model": "org/bert", "deltas": ["hf://org/red"]}
    assert evaluated(tmp_path / "b.jsonl", *there) == {**expected, **names}


def test_a_model_is_described_before_its_weights_come(published: HubServer) -> None:
    located = locate("hf://org/bert")
    assert not published.calls("model.safetensors")
    assert not (located.folder / "model.safetensors").exists()
    assert (with_weights(located).folder / "model.safetensors").is_file()
    assert located.model_id == "org/bert"


def test_models_that_cannot_be_had(published: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        MissingFileError, match=r"'org/none' is no local folder, .* shows no repository"
    ):
        locate("org/none")
    with pytest.raises(MissingFileError, match="neither a local folder nor on the Hub"):
        locate("org/none/deeper/still")
    with pytest.raises(ConfigError, match="names a revision, and the setting revision is v2"):
        locate("hf://org/bert@v1", "v2")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailableError, match="offline mode is on"):
        locate("org/bert")
