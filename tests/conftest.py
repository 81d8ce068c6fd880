"""What all tests share: no network, quiet libraries, small synthetic checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from browser_lab import Browser
    from hub_server import HubServer

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


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny encoder with its tokenizer; nobody writes to it."""
    from tiny_models import write_bert  # imports torch, which most tests do without

    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 120 sentences labelled by the colour in them."""
    from tiny_models import colour_rows, write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("data") / "colours.jsonl", colour_rows(120))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of this test's own with an empty cache, a user "org" and no one logged in.

    What the client reads from the environment when it is imported is set where it keeps it.
    """
    import huggingface_hub
    from hub_server import HubServer
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        server.tokens["hf_org"] = "org"
        yield server
        huggingface_hub.close_session()  # its kept connections outlive the server


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The browser of this worker. Without one tests skip, where DELTAKIT_NEEDS_BROWSER=1 they fail."""
    from browser_lab import find_browser, started

    paths = find_browser()
    if paths is None:
        missing = "no chromium with chromedriver on the PATH (`make browser` installs them)"
        (pytest.fail if os.environ.get("DELTAKIT_NEEDS_BROWSER") == "1" else pytest.skip)(missing)
    with started(paths, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """A blank page in a headless Chromium; at the end of the test the console holds no error."""
    chromium.reset()
    yield chromium
    assert chromium.errors() == []
