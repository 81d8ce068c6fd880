"""Commands that are interrupted while they write leave nothing half-written behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from terminal_lab import INTERRUPTIBLE, environment, on_terminal

import deltakit as dk

# Stops itself where the first file that it writes is whole, but not yet at its place.
STOPPED = (
    INTERRUPTIBLE
    + """
import os, runpy, sys
def stop(event, arguments):
    if event == "os.rename" and stop.armed and ".tmp" in os.fspath(arguments[0]):
        stop.armed = False
        print("stopping", flush=True)
        os.kill(os.getpid(), NUMBER)
stop.armed = True
sys.addaudithook(stop)
runpy.run_module("deltakit", run_name="__main__")
"""
)
SIGNALS = {signal.SIGINT: (130, "Interrupted.\n"), signal.SIGTERM: (143, "Terminated.\n")}
COMMANDS = {
    "truncate": ["truncate", "delta.sdelta", "-b", "20"],
    "merge": ["merge", "base.safetensors", "delta.sdelta", "-o", "out.safetensors"],
    "merge, by threads": ["merge", "model", "delta.sdelta", "-o", "out", "--workers", "2"],
    "merge, by a job": ["merge", "model", "delta.sdelta", "-o", "out", "--shard", "1/1"],
    "merge, replacing": [
        "merge",
        "base.safetensors",
        "delta.sdelta",
        "-o",
        "old.safetensors",
        "--force",
    ],
    "stack": ["stack", "delta.sdelta", "delta.sdelta", "--method", "ties"],
    "diff": ["diff", "base.safetensors", "tuned.safetensors", "-o", "out.sdelta"],
    "diff, by threads": [
        *("diff", "base.safetensors", "tuned.safetensors", "-o", "out.sdelta", "--workers", "2")
    ],
    "diff, by a job": [
        *("diff", "base.safetensors", "tuned.safetensors", "-o", "out.sdelta", "--shard", "1/2")
    ],
    "convert": ["convert", "delta.sdelta", "out.safetensors", "--to", "coo-safetensors"],
    "compare": ["compare", "delta.sdelta", "delta.sdelta", "--html", "out.html"],
    "demo": ["demo", "--files-only", "-o", "demo"],
}


def stopped(arguments: list[str], sent: signal.Signals, folder: Path) -> str:
    """The stderr of a command that the signal reaches in the middle; checks how it ends."""
    code = STOPPED.replace("NUMBER", str(int(sent)))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    exit_code, line = SIGNALS[sent]
    assert (done.returncode, done.stdout) == (exit_code, "stopping\n"), done.stderr
    assert done.stderr.endswith(line)
    return done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def files(delta_file: Path) -> Path:
    """A folder with a base, alone and in a model's folder, a tuned one, a delta and an output."""
    folder = delta_file.parent
    base = (folder / "base.safetensors").read_bytes()
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(base)
    (folder / "old.safetensors").write_bytes(b"an output that is there")
    dk.merge(folder / "base.safetensors", [delta_file], folder / "tuned.safetensors")
    return folder


@pytest.mark.parametrize("sent", SIGNALS, ids=lambda sent: sent.name)
@pytest.mark.parametrize("name", COMMANDS)
def test_what_writes_leaves_all_as_it_was(name: str, sent: signal.Signals, files: Path) -> None:
    """One line, the exit code of the signal, no file more and none less."""
    before = contents(files)
    assert stopped(COMMANDS[name], sent, files) == SIGNALS[sent][1]
    assert contents(files) == before


@pytest.mark.parametrize("sent", SIGNALS, ids=lambda sent: sent.name)
def test_a_merge_in_place_and_its_revert_are_whole_again(sent: signal.Signals, files: Path) -> None:
    base = files / "base.safetensors"
    before = base.read_bytes()
    merging = ["merge", "base.safetensors", "delta.sdelta", "--in-place"]
    stopped(merging, sent, files)
    assert base.read_bytes() == before
    dk.merge_in_place(base, [files / "delta.sdelta"])
    merged = load_file(files / "tuned.safetensors")
    assert {n: a.tobytes() for n, a in load_file(base).items()} == {
        n: a.tobytes() for n, a in merged.items()
    }
    dk.revert(base)
    assert base.read_bytes() == before


# Shows a bar, and is interrupted under it.
SLOW = (
    INTERRUPTIBLE
    + """
import os, sys, time, types, click
from deltakit.cli.main import COMMANDS, main
from deltakit.cli.options import progress
@click.command()
def command():
    with progress("Writing") as advance:
        assert advance is not None
        advance(1, 10)
        time.sleep(0.6)
        advance(2, 10)
        os.kill(os.getpid(), NUMBER)
sys.modules["slow"] = types.SimpleNamespace(command=command)
COMMANDS["slow"] = COMMANDS["inspect"]._replace(module="slow")
main(["slow"])
"""
)


@pytest.mark.parametrize("sent", SIGNALS, ids=lambda sent: sent.name)
def test_a_terminal_gets_its_cursor_back(sent: signal.Signals) -> None:
    code, line = SIGNALS[sent]
    command = [sys.executable, "-c", SLOW.replace("NUMBER", str(int(sent)))]
    ended, shown = on_terminal(command)
    assert ended == code
    assert "Writing" in shown
    assert "20%" in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0
    assert shown.endswith(line.replace("\n", "\r\n"))


def test_no_terminal_no_bar(files: Path) -> None:
    """Neither bars nor carriage returns, whatever the environment says about colours."""
    done = subprocess.run(
        [sys.executable, "-m", "deltakit", *COMMANDS["merge"]],
        env=environment(FORCE_COLOR="1"),
        cwd=files,
        capture_output=True,
        check=True,
    )
    assert b"\r" not in done.stdout + done.stderr
    assert done.stderr == b""
