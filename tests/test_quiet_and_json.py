"""--quiet and --json of every command that reports something, as a script would use them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hub_server import HubServer
from push_lab import log_in

import deltakit as dk
from deltakit.cli.main import COMMANDS, main
from deltakit.formats.checkpoint import Checkpoint

# A number with a unit or with commas, which is for people.
FOR_PEOPLE = re.compile(r"^-?\d+(,\d{3})+$|^-?[\d.]+ ?(B|[kMGT]B|%|k|m)$")

CALLS = {
    "inspect": ["inspect", "delta.sdelta"],
    "truncate": ["truncate", "delta.sdelta", "-b", "25"],
    "truncate nothing": ["truncate", "delta.sdelta", "-b", "1k"],
    "merge": ["merge", "base.safetensors", "delta.sdelta"],
    "merge --dry-run": ["merge", "base.safetensors", "delta.sdelta", "--dry-run"],
    "merge without identity": ["merge", "base.safetensors", "bare.sdelta"],
    "merge --allow-base-mismatch": [
        *("merge", "other.safetensors", "delta.sdelta", "--allow-base-mismatch")
    ],
    "merge --shard": ["merge", "base.safetensors", "delta.sdelta", "-o", "out", "--shard", "1/1"],
    "merge --in-place": ["merge", "other.safetensors", "bare.sdelta", "--in-place"],
    "revert": ["revert", "merged.safetensors"],
    "stack": ["stack", "delta.sdelta", "bare.sdelta", "--method", "ties"],
    "compare": ["compare", "delta.sdelta", "bare.sdelta"],
    "diff": ["diff", "base.safetensors", "other.safetensors", "-o", "out.sdelta"],
    "diff --shard": [
        *("diff", "base.safetensors", "other.safetensors", "-o", "out.sdelta", "--shard", "1/2")
    ],
    "convert": ["convert", "delta.sdelta", "out.safetensors", "--to", "coo-safetensors"],
    "verify": ["verify", "delta.sdelta"],
    "verify --base": ["verify", "delta.sdelta", "--base", "base.safetensors"],
    "verify --shard": ["verify", "delta.sdelta", "--shard", "1/2", "--workers", "2"],
    "push --dry-run": ["push", "delta.sdelta", "org/news", "--dry-run"],
    "push": ["push", "delta.sdelta", "org/news"],
    "pull": ["pull", "org/there", "-o", "pulled.sdelta"],
    "demo": ["demo", "--files-only", "-o", "demo"],
}
TRAINING = {"train", "sweep", "lr-find", "evaluate"}  # in their own tests, which train
SILENT = {"completion"}


def test_every_command_is_here() -> None:
    assert {call[0] for call in CALLS.values()} | TRAINING | SILENT == set(COMMANDS)


def test_every_command_that_reports_takes_json() -> None:
    for name in set(COMMANDS) - SILENT:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        assert "as_json" in {parameter.name for parameter in command.params}, name


@pytest.fixture(autouse=True)
def _files(
    delta_file: Path,
    other_checkpoint: Checkpoint,
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a folder with bases, a delta, the same without identity, and a merged model."""
    monkeypatch.chdir(delta_file.parent)
    delta = dk.load("delta.sdelta")
    dk.save(dk.SparseDelta(tensors=delta.tensors), "bare.sdelta")
    Path("merged.safetensors").write_bytes(Path("base.safetensors").read_bytes())
    dk.merge_in_place("merged.safetensors", [delta])
    hub.add("org/news", {"notes.json": b"{}"})
    hub.add("org/there", {"delta.sdelta": delta_file.read_bytes()})
    log_in(hub, monkeypatch)


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, list(arguments))
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own
@pytest.mark.parametrize("name", CALLS)
def test_quiet_leaves_stderr_empty(name: str) -> None:
    code, out, err = run(*CALLS[name], "--quiet")
    assert (code, err) == (0, "")
    assert out


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("name", CALLS)
def test_json_is_one_document_of_exact_numbers(name: str) -> None:
    code, out, _ = run(*CALLS[name], "--json")
    assert code == 0
    for path, value in leaves(json.loads(out)):
        assert not isinstance(value, str) or not FOR_PEOPLE.match(value), (path, value)


@pytest.mark.parametrize("name", sorted({call[0] for call in CALLS.values()} - {"demo", "pull"}))
def test_an_error_with_json_is_a_line_on_stderr(name: str) -> None:
    first = next(call for call in CALLS.values() if call[0] == name)
    broken = [
        f"gone-{part}" if part.endswith(("sdelta", "safetensors")) else part for part in first
    ]
    code, out, err = run(*broken, "--json")
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1


def leaves(told: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in a document that holds no others, with the way to it."""
    if isinstance(told, dict):
        for key, value in told.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(told, list):
        for value in told:
            yield from leaves(value, f"{path}[]")
    else:
        yield path, told
