"""Colours, encodings and pipes: what is right on a terminal never reaches a file."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from terminal_lab import DELTAKIT, environment, on_terminal

import deltakit as dk
from deltakit.cli.terminal import asked_colour

BOLD, RED, GREEN, CYAN = "\x1b[1m", "\x1b[31m", "\x1b[32m", "\x1b[36m"


@pytest.mark.parametrize(
    ("variables", "colours"),
    [
        ({}, None),
        ({"TERM": "xterm"}, None),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, None),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        ({"FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": "0"}, None),
        ({"CLICOLOR_FORCE": "1", "TERM": "dumb"}, True),
        ({"CLICOLOR_FORCE": "0"}, None),
        ({"CLICOLOR": "0"}, False),
        ({"CLICOLOR": "1"}, None),
        ({"TERM": "dumb"}, False),
    ],
)
def test_what_the_environment_asks_for(variables: dict[str, str], colours: bool | None) -> None:
    assert asked_colour(variables) is colours


def piped(*arguments: object, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """A run of `deltakit ARGUMENTS` into pipes."""
    command = [*DELTAKIT, *map(str, arguments)]
    return subprocess.run(command, env=environment(**variables), capture_output=True, check=False)


def test_terminals_show_headings_errors_and_suggestions_in_colour(delta_file: Path) -> None:
    code, shown = on_terminal([*DELTAKIT, "inspect", "--tensosr", delta_file])
    assert code == 2
    assert f"{RED}{BOLD}Error:\x1b[0m no option '--tensosr'; nearest: {GREEN}--tensors" in shown
    code, shown = on_terminal([*DELTAKIT, "verify", delta_file])
    assert (code, shown.startswith(f"{CYAN}Note:\x1b[0m no base given")) == (0, True)
    assert f"{BOLD}Options:" in on_terminal([*DELTAKIT, "verify", "--help"])[1].replace(
        "\x1b[0m:", ":"
    )


@pytest.mark.parametrize("arguments", [["--help"], ["verify"], ["inspect", "--json"]])
def test_terminals_without_colours_and_json_get_none(
    arguments: list[str], delta_file: Path
) -> None:
    if "--help" not in arguments:
        arguments = [*arguments, str(delta_file)]
    variables = {} if "--json" in arguments else {"NO_COLOR": "1"}
    code, shown = on_terminal([*DELTAKIT, *arguments], env=environment(**variables))
    assert (code, "\x1b" in shown) == (0, False)


def test_pipes_get_colours_only_when_forced(delta_file: Path) -> None:
    for arguments in (["--help"], ["verify", delta_file], ["inspect", "--tensosr"]):
        done = piped(*arguments)
        assert b"\x1b" not in done.stdout + done.stderr
    assert RED.encode() in piped("inspect", "--tensosr", FORCE_COLOR="1").stderr
    forced = piped("inspect", delta_file, "--json", FORCE_COLOR="1")
    assert json.loads(forced.stdout)["entries"] == 110


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A delta whose tensor has a name beyond ASCII."""
    tensor = dk.TensorDelta(
        name="été.\N{GREEK SMALL LETTER PHI}",
        shape=(4,),
        dtype="float32",
        mode="add",
        indices=np.array([1, 3]),
        values=np.array([1.0, 2.0], np.float32),
    )
    dk.save(dk.SparseDelta(tensors={tensor.name: tensor}), tmp_path / "été.sdelta")
    return tmp_path / "été.sdelta"


@pytest.mark.parametrize(
    "variables",
    [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C"}],
    ids=str,
)
def test_terminals_that_lack_characters(variables: dict[str, str], strange: Path) -> None:
    """Nothing ends in an error, and JSON stays JSON with the name whole."""
    done = piped("inspect", strange, "--tensors", **variables)
    assert (done.returncode, done.stderr) == (0, b"")
    done = piped("inspect", strange, "--json", **variables)
    encoding = variables.get("PYTHONIOENCODING", "utf-8")
    name = json.loads(done.stdout.decode(encoding))["tensors"][0]["name"]
    assert (done.returncode, name) == (0, "été.φ")
    done = piped("inspect", f"{strange}.gone", **variables)
    assert (done.returncode, done.stderr[:6], done.stderr.count(b"\n")) == (1, b"Error:", 1)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["stack", "--list-methods"]]
)
def test_a_reader_that_goes_away_ends_it_quietly(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*DELTAKIT, *arguments],
        env=environment(),
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
