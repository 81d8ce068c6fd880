"""Whatever takes a DELTA or a BASE takes `hf://` for it, and gives what local files give."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import save_trained
from checkpoint_factory import random_array, write_safetensors
from click.testing import CliRunner
from foreign_files import lt_sft_encoding, save_as
from hub_server import HubServer
from peft import LoraConfig
from tiny_models import colour_rows, write_bert, write_jsonl, write_llama
from train_lab import deltakit, train_flags
from transformers import AutoModelForCausalLM

import deltakit as dk
from deltakit.cli.main import COMMANDS, main
from deltakit.cli.values import SourcePath
from deltakit.errors import ConfigError, HubNotFoundError
from deltakit.formats.sdelta import encode

ELSEWHERE = {
    ("push", "paths"),  # told by the tests of pushes
    ("sweep", "model"),  # every run of a sweep is a `train` of its own
}
SETTINGS = {"init_delta", "avoid", "mask"}  # name deltas; train, sweep and lr-find share them
TASK = "--data colours.jsonl --task sequence-classification --label-column label"
TRAIN = f"{TASK} --budget 40 --max-steps 3 --batch-size 8 --lr 0.05 --output-dir run"


@dataclass(frozen=True)
class Row:
    """A command whose `DELTA`, `OTHER`, `BASE` and `TUNED` are local files once, and on the Hub once.

    takes: the parameters that are given so. writes: what is compared, else it is the JSON that is
    printed, under the keys of `tells`. MODEL: a tiny encoder, with the deltas HEAD and MORE.
    """

    command: str
    takes: tuple[str, ...]
    arguments: str
    writes: str | None = None
    tells: tuple[str, ...] = ()


ROWS = [
    Row("inspect", ("delta",), "DELTA", tells=("entries", "bytes", "base", "extras")),
    Row("verify", ("delta", "base"), "DELTA --base BASE", tells=("ok", "entries", "notes")),
    Row("truncate", ("delta", "base"), "DELTA --base BASE -b 20 -o out", "out"),
    Row("merge", ("paths",), "BASE DELTA OTHER --weights 0.5,2 -o out", "out/model.safetensors"),
    Row("stack", ("deltas", "base"), "DELTA OTHER --base BASE --method ties -o out", "out"),
    Row("compare", ("deltas",), "DELTA OTHER", tells=("pairs",)),
    Row("diff", ("base", "tuned"), "BASE TUNED -o out", "out"),
    Row("convert", ("source", "base"), "DELTA out --to coo-safetensors --base BASE", "out"),
    Row(
        "evaluate",
        ("model", "deltas"),
        f"--model MODEL --delta HEAD {TASK}",
        tells=("metrics", "logits_sha256"),
    ),
    Row(
        "train",
        ("model", "init_delta", "avoid"),
        f"--model MODEL --init-delta HEAD --avoid MORE {TRAIN}",
        "run/delta.sdelta",
    ),
    Row("train", ("mask",), f"--model MODEL --method mask --mask MORE {TRAIN}", "run/delta.sdelta"),
    Row("lr-find", ("model",), f"--model MODEL {TRAIN}", tells=("rate", "lambda_max", "center")),
    Row(
        "stack",
        ("model",),
        f"HEAD MORE --head 0 --tune-weights --evaluations 4 --model MODEL {TASK} -o out",
        "out",
    ),
]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all local files."""
    folder = tmp_path_factory.mktemp("local")
    random = np.random.default_rng(0)
    weights = {name: random_array(random, (20, 30), np.float32) for name in ("v", "w")}
    tuned = {name: array + (random.random((20, 30)) < 0.1) for name, array in weights.items()}
    for name, tensors in (("base", weights), ("tuned", tuned)):
        (folder / name).mkdir()
        arrays = {key: array.astype(np.float32) for key, array in tensors.items()}
        write_safetensors(folder / name / "model.safetensors", arrays)
    whole = dk.diff(folder / "base", folder / "tuned", mode="add")
    dk.save(whole, folder / "delta.sdelta")
    dk.save(dk.scale(dk.truncate(whole, 50), -0.5), folder / "other.sdelta")
    model = write_bert(folder / "model")
    write_jsonl(folder / "colours.jsonl", colour_rows(60))
    for name, seed in (("head", 0), ("more", 1)):
        flags = train_flags(model, folder / "colours.jsonl", folder / name, max_steps=3, budget=40)
        done = deltakit("train", *flags, "--seed", seed, "--method", "random")
        assert done.exit_code == 0, done.output
        (folder / name / "delta.sdelta").rename(folder / f"{name}.sdelta")
    return folder


@pytest.fixture
def published(hub: HubServer, local: Path) -> HubServer:
    """A Hub with all of them: bases as repositories, deltas as files of `org/deltas`."""
    for name in ("base", "tuned", "model"):
        hub.add(f"org/{name}", {p.name: p.read_bytes() for p in (local / name).iterdir()})
    hub.add("org/deltas", {p.name: p.read_bytes() for p in local.glob("*.sdelta")})
    return hub


def places(local: Path, on_the_hub: bool) -> dict[str, str]:
    """What stands for the capital words of a row."""
    bases = {n.upper(): f"hf://org/{n}" if on_the_hub else str(local / n) for n in _BASES}
    root = "hf://org/deltas" if on_the_hub else str(local)
    return bases | {name.upper(): f"{root}/{name}.sdelta" for name in _DELTAS}


_BASES = ("base", "tuned", "model")
_DELTAS = ("delta", "other", "head", "more")


def outcome(row: Row, words: dict[str, str]) -> Any:
    """What the row's command gives, run in the working directory."""
    arguments = [words.get(word, word) for word in row.arguments.split()]
    done = CliRunner().invoke(main, [row.command, *arguments, "--json"])
    assert done.exit_code == 0, done.stderr
    if row.writes is None:
        told = json.loads(done.stdout)
        return {key: told[key] for key in row.tells if key in told}
    if row.command in ("merge", "convert"):
        return Path(row.writes).read_bytes()
    delta = dk.load(row.writes)  # whose description names the base
    tensors = {n: (t.indices.tolist(), t.values.tobytes()) for n, t in delta.tensors.items()}
    return tensors, {name: array.tobytes() for name, array in delta.extras.items()}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.command} {'+'.join(row.takes)}")
def test_a_location_gives_what_a_local_file_gives(
    row: Row, published: HubServer, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for on_the_hub in (False, True):
        folder = tmp_path / str(on_the_hub)
        folder.mkdir()
        (folder / "colours.jsonl").symlink_to(local / "colours.jsonl")
        monkeypatch.chdir(folder)
        found.append(outcome(row, places(local, on_the_hub)))
    assert found[0] == found[1]
    assert found[0]


def test_every_command_has_a_row() -> None:
    """A command, or a setting, that comes to take a DELTA or a BASE must get one."""
    there = set()
    for name, entry in COMMANDS.items():
        for parameter in import_module(entry.module).command.params:
            if isinstance(parameter.type, SourcePath):
                there.add((name, parameter.name))
            elif parameter.name == "model" and parameter.param_type_name == "option":
                there.add((name, "model"))
    covered = {(row.command, name) for row in ROWS for name in row.takes}
    assert there - ELSEWHERE == {pair for pair in covered if pair[1] not in SETTINGS}
    assert {name for _, name in covered} >= SETTINGS


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder, and in `lora/` beside it an adapter that peft saved."""
    folder = tmp_path_factory.mktemp("llama")
    base = write_llama(folder / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_trained(base, AutoModelForCausalLM, config, folder / "lora")
    return folder


@pytest.mark.parametrize("place", ["", "/v1", "/v1/adapter_model.safetensors"])
def test_a_folder_of_peft_is_converted_from_the_hub(
    hub: HubServer, llama: Path, tmp_path: Path, place: str
) -> None:
    """Of the repository, only the adapter and its configuration are downloaded."""
    under = "v1/" if place else ""
    files = {f"{under}{p.name}": p.read_bytes() for p in (llama / "lora").iterdir()}
    hub.add("org/lora", {**files, f"{under}optimizer.pt": b"much", "training_args.bin": b"x"})
    hub.add("org/llama", {p.name: p.read_bytes() for p in (llama / "base").iterdir()})
    here, there = tmp_path / "here.sdelta", tmp_path / "there.sdelta"
    dk.convert(llama / "lora", here, base=llama / "base", budget=50)
    report = dk.convert(f"hf://org/lora{place}", there, base="hf://org/llama", budget=50)
    assert report.from_format == "peft-lora"
    one, other = dk.load(here), dk.load(there)
    assert {n: t.values.tobytes() for n, t in one.tensors.items()} == {
        n: t.values.tobytes() for n, t in other.tensors.items()
    }
    assert other.base is not None
    assert other.base.model_id == "org/llama"
    wanted = {f"{under}adapter_config.json", f"{under}adapter_model.safetensors"}
    got = {
        call.partition("/resolve/")[2].partition("/")[2] for call in hub.calls("HEAD /org/lora/re")
    }
    assert got == wanted


def test_a_pickled_patch_is_converted_from_the_hub(hub: HubServer, tmp_path: Path) -> None:
    import torch

    change = torch.zeros(20, 30)
    change[3, 4] = 0.5
    file = save_as(tmp_path / "pytorch_diff.bin", {"diffs": {"w": lt_sft_encoding(change)}})
    hub.add("org/sft", {file.name: file.read_bytes(), "README.md": b"#"})
    for place in ("hf://org/sft", "hf://org/sft/pytorch_diff.bin"):
        report = dk.convert(place, tmp_path / "out.sdelta", force=True)
        assert (report.from_format, report.entries) == ("lt-sft", 1)


def test_what_is_nothing_to_convert(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/x", {"README.md": b"#"})
    hub.add("org/two", {"a.sdelta": b"x", "b.sdelta": b"x"})
    with pytest.raises(HubNotFoundError, match=r"org/x has no .safetensors file"):
        dk.convert("hf://org/x", tmp_path / "out.sdelta")
    with pytest.raises(ConfigError, match=r"holds a.sdelta, b.sdelta; name one"):
        dk.convert("hf://org/two", tmp_path / "out.sdelta")


def test_inspecting_50_mb_transfers_less_than_100_kb(hub: HubServer) -> None:
    """Counted at the server: every byte of every answer's body."""
    random = np.random.default_rng(0)
    tensors = {}
    for layer in range(12):
        for kind in ("q", "k", "v", "o", "up", "down"):
            name = f"model.layers.{layer}.{kind}_proj.weight"
            tensors[name] = dk.TensorDelta(
                name=name,
                shape=(4096, 4096),
                dtype="bfloat16",
                mode="add",
                indices=np.cumsum(random.integers(1, 128, 145_000)),
                values=random.standard_normal(145_000).astype(np.float32),
            )
    data = encode(dk.SparseDelta(tensors=tensors))
    assert len(data) > 50_000_000
    hub.add("org/large", {"delta.sdelta": data})
    done = CliRunner().invoke(main, ["inspect", "hf://org/large", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["entries"] == 72 * 145_000
    assert 0 < sum(each.sent for each in hub.seen) < 100_000
