"""Completion: what shells are told, and that bash, zsh and fish make of it what is meant."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from terminal_lab import ROOT, environment, on_terminal

from deltakit.adapters.kinds import KINDS
from deltakit.cli.main import COMMANDS, main
from deltakit.cli.shells import Bash, Fish, script
from deltakit.combine import METHODS as STACKING
from deltakit.formats.bridges import BRIDGES
from deltakit.selection import HEURISTICS, METHODS
from deltakit.targets.preset_names import TARGET_PRESETS
from deltakit.training.config import describe
from deltakit.training.presets import PRESETS
from deltakit.training.tasks import TASKS

SHELLS = ("bash", "zsh", "fish")


def offered(line: str, kind: type[Bash | Fish] = Bash) -> list[tuple[str, str]]:
    """Kind and value of all that is offered after `deltakit LINE`, in this process."""
    words = line.split(" ")
    made = kind(main, {}, "deltakit", "_DELTAKIT_COMPLETE")
    found = made.get_completions(words[:-1], words[-1])
    return [(item.type, item.value) for item in found]


def plain(line: str) -> set[str]:
    items = offered(line)
    assert {kind for kind, _ in items} <= {"plain"}
    return {value for _, value in items}


def test_commands_and_options() -> None:
    assert plain("") == set(COMMANDS)
    assert plain("tr") == {"train", "truncate"}
    assert {"--version", "--quiet", "--help"} <= plain("--")
    flags = {f"--{name.replace('_', '-')}" for name in describe()}
    assert flags < plain("train --")
    assert plain("truncate x.sdelta --b") == {"--budget", "--by", "--base"}
    assert plain("no-such-command x") == set()


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("train --method ", METHODS.names()),
        ("train --heuristic ", HEURISTICS.names()),
        ("train --target ", list(TARGET_PRESETS)),
        ("train --preset ", [*PRESETS, "none"]),
        ("train --task ", TASKS.names()),
        ("train --adapter ", KINDS.names()),
        ("train --allocation ", ["global", "proportional", "uniform", "erdos-renyi"]),
        ("lr-find --schedule ", ["uniform", "linear", "cosine", "once"]),
        ("evaluate --task ", TASKS.names()),
        ("stack --method ", STACKING.names()),
        ("merge base a.sdelta --method ", STACKING.names()),
        ("convert in out --to ", BRIDGES.names()),
        ("truncate --by ", ["magnitude", "order"]),
        ("completion ", list(SHELLS)),
    ],
)
def test_names_of_registries_and_choices(line: str, names: list[str]) -> None:
    assert plain(line) == set(names)
    first = names[0]
    assert first in plain(line + first[:2])


def test_lists_are_completed_at_their_end() -> None:
    assert plain("train --compare id3,lor") == {"id3,lora"}
    assert {"lora", "id3", "id3-paper"} <= plain("train --compare ")
    assert plain("train --generate-metrics bleu,rou") == {"bleu,rouge_l"}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("inspect ", ("file", ".sdelta")),
        ("stack a.sdelta ", ("file", ".sdelta")),
        ("merge ", ("file", ".safetensors .sdelta")),
        ("diff ", ("file", ".safetensors")),
        ("truncate a.sdelta --base ", ("file", ".safetensors")),
        ("truncate a.sdelta -o ", ("file", ".sdelta")),
        ("train ", ("file", ".yaml .yml")),
        ("train --init-delta ", ("file", ".sdelta")),
        ("train --data ", ("file", "")),
        ("train --output-dir ", ("dir", "")),
        ("evaluate --model ", ("file", ".safetensors")),
        ("demo -o ", ("dir", "")),
    ],
)
def test_paths_are_left_to_the_shell(line: str, told: tuple[str, str]) -> None:
    assert offered(line) == [told]


def test_words_that_bash_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """bash puts a completion behind the last = or : of a word, fish in place of the whole word."""
    monkeypatch.setenv("COMP_WORDBREAKS", " \t\n\"'><=;|&(:")
    assert offered("train --method n:") == [("plain", "m")]
    assert offered("train --method=n:") == [("plain", "m")]
    assert offered("stack --method=ti") == [("plain", "ties")]
    assert offered("stack --method=ti", Fish) == [("plain", "--method=ties")]


def test_completing_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys\nfrom deltakit.cli.main import main\n"
        "try:\n    main(prog_name='deltakit')\nexcept SystemExit as end:\n"
        "    assert not end.code\n"
        "assert not {'torch', 'numpy', 'transformers', 'rich'} & set(sys.modules)\n"
    )
    for line in ("deltakit tr", "deltakit train --method i", "deltakit stack --method t"):
        told = {"_DELTAKIT_COMPLETE": "bash_complete", "COMP_LINE": line}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(**told),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("plain,")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with files to complete and, in bin, the program and the scripts."""
    for name in ("one.sdelta", "one.txt", "run.yaml", "run.json"):
        (tmp_path / name).touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "deltakit"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m deltakit "$@"\n')
    program.chmod(0o755)
    for shell in SHELLS:
        (tmp_path / "bin" / shell).write_text(script(shell))
    return tmp_path


TYPED = {
    "deltakit trunc": "deltakit truncate",
    "deltakit stack --method tie": "deltakit stack --method ties",
    "deltakit stack --method=tie": "deltakit stack --method=ties",
    "deltakit train --method n:": "deltakit train --method n:m",
    "deltakit inspect o": "deltakit inspect one.sdelta",
    "deltakit train r": "deltakit train run.yaml",
    "deltakit demo -o m": "deltakit demo -o model/",
}
START = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "source bin/bash"),
    "zsh": (["zsh", "-f", "-i"], "autoload -U compinit && compinit -u -d .dump && source bin/zsh"),
}


@pytest.mark.parametrize("shell", list(START))
def test_tab_completes(shell: str, place: Path) -> None:
    """Typed into the shell itself: what stands before Tab becomes what is meant."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    program, source = START[shell]
    # Ctrl-A goes to the beginning of the line, so that it is printed and not run.
    typed = "".join(f"{line}\t\x01echo @@ \r" for line in TYPED)
    env = environment(PATH=f"{place / 'bin'}:/usr/bin:/bin", PYTHONPATH=str(ROOT), HOME=str(place))
    _, seen = on_terminal(program, f"{source}\r{typed}exit\r", env, cwd=place)
    printed = re.findall(r"@@ (deltakit [^\r\n\x1b]*?)[ /]*\r", seen)
    assert printed == [line.rstrip("/") for line in TYPED.values()], seen


def test_fish_completes(place: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    ask = "; ".join(f"echo @@; complete -C '{line}'" for line in TYPED)
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"source bin/fish; {ask}"],
        env=environment(PATH=f"{place / 'bin'}:/usr/bin:/bin", HOME=str(place)),
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    told = [part.split("\n") for part in done.stdout.split("@@\n")[1:]]
    for offers, line in zip(told, TYPED.values(), strict=True):
        assert offers[0].partition("\t")[0] == line.rpartition(" ")[2], done


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_printed(shell: str, place: Path) -> None:
    done = subprocess.run(
        [place / "bin" / "deltakit", "completion", shell],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (script(shell), "")
