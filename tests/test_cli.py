"""The frame of the command line: help, usage, errors and exit codes."""

from __future__ import annotations

import importlib
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

import deltakit
from deltakit.cli import options, values
from deltakit.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]


NO_TORCH = "this needs torch, which is not installed; pip install 'deltakit-sparse[train]'"


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `deltakit ARGUMENTS`, in this process."""
    done = CliRunner().invoke(main, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def test_help_lists_every_command_with_its_line() -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for name, entry in COMMANDS.items():
        assert f"  {name} " in out
        assert entry.summary in out


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_line_of_a_command_is_its_own(name: str) -> None:
    """The table repeats what the command says of itself, so that help need not import it."""
    command = importlib.import_module(COMMANDS[name].module).command
    assert isinstance(command, click.Command)
    assert command.get_short_help_str(limit=200) == COMMANDS[name].summary


def test_every_file_with_a_command_is_in_the_table() -> None:
    files = {p.stem for p in (ROOT / "cli").glob("*.py") if "\ndef command(" in p.read_text()}
    assert files == {entry.module.rpartition(".")[2] for entry in COMMANDS.values()}


@pytest.mark.parametrize("name", list(COMMANDS))
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_explains_itself(name: str, flag: str) -> None:
    code, out, err = run(name, flag)
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: main {name} ")
    assert "--quiet" in out


def test_version_tells_what_deltakit_stands_on() -> None:
    code, out, err = run("--version")
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first == f"deltakit {deltakit.__version__}"
    assert second.startswith(f"Python {platform.python_version()}, numpy {np.__version__}, ")


def test_deltakit_alone_prints_the_help() -> None:
    assert run() == run("--help")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_of_a_command_is_its_help(name: str) -> None:
    assert run("help", name) == run(name, "--help")


def test_a_misspelt_command_is_wrong_usage_with_a_hint() -> None:
    code, out, err = run("trunkate", "x")
    assert (code, out) == (2, "")
    assert err.endswith("Error: no command 'trunkate'; nearest: truncate\n")


def test_a_strange_command_is_answered_with_all_of_them() -> None:
    code, _, err = run("xyz")
    assert code == 2
    assert err.endswith(f"Error: no command 'xyz'; known: {', '.join(COMMANDS)}\n")


def test_a_typed_error_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "nothing.sdelta"
    line = f"Error: cannot read {path}: No such file or directory\n"
    assert run("inspect", str(path)) == (1, "", line)


def test_debugging_shows_where_an_error_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTAKIT_DEBUG", "1")
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "nothing.sdelta")])
    assert isinstance(done.exception, deltakit.DeltakitError)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A command `fail KIND` that raises what KIND names, entered in the table."""
    (tmp_path / "failing_command.py").write_text(
        "import click, errno\n"
        "KINDS = {\n"
        "    'full': OSError(errno.ENOSPC, 'No space left on device', 'out.sdelta'),\n"
        "    'denied': PermissionError(errno.EACCES, 'Permission denied', 'a', None, 'b'),\n"
        "    'torch': ModuleNotFoundError(\"No module named 'torch.nn'\", name='torch.nn'),\n"
        "    'memory': MemoryError(),\n"
        "    'stop': KeyboardInterrupt(),\n"
        "    'bug': ZeroDivisionError('a bug'),\n"
        "}\n"
        "@click.command()\n"
        "@click.argument('kind')\n"
        "def command(kind):\n"
        "    raise KINDS[kind]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "fail", COMMANDS["inspect"]._replace(module="failing_command"))
    return "fail"


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("full", 1, "Error: no space left on device: out.sdelta\n"),
        ("denied", 1, "Error: permission denied: a -> b\n"),
        ("torch", 1, f"Error: {NO_TORCH}\n"),
        ("memory", 1, "Error: out of memory\n"),
        ("stop", 130, "Interrupted.\n"),
    ],
)
def test_what_the_system_says_is_one_line(failing: str, kind: str, code: int, line: str) -> None:
    assert run(failing, kind) == (code, "", line)
    sys.modules.pop("failing_command")


def test_a_defect_keeps_its_traceback(failing: str) -> None:
    """Only what a user can mend is cut down to a line."""
    done = CliRunner().invoke(main, [failing, "bug"])
    assert isinstance(done.exception, ZeroDivisionError)
    sys.modules.pop("failing_command")


def test_a_closed_pipe_ends_quietly(delta_file: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "deltakit", "inspect", str(delta_file)],
        stdout=writing,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_sigterm_unwinds_so_that_nothing_partial_stays(tmp_path: Path) -> None:
    """A command that is terminated while it writes removes its temporary file."""
    code = (
        "import os, signal, sys, types, click\n"
        "from deltakit.cli.main import COMMANDS, main\n"
        "from deltakit.formats.atomic import replacing\n"
        "@click.command()\n"
        "def command():\n"
        "    with replacing('out'):\n"
        "        assert len(os.listdir('.')) == 1\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.modules['slow'] = types.SimpleNamespace(command=command)\n"
        "COMMANDS['slow'] = COMMANDS['inspect']._replace(module='slow')\n"
        "main(['slow'])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, check=False
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert (done.stdout, done.stderr) == (b"", b"Terminated.\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "value"),
    [("100k", 100_000), ("2.5m", 2_500_000), ("5000", 5000), ("0.1%", "0.1%"), (" 7 ", 7)],
)
def test_budgets_become_numbers_and_shares_stay(text: str, value: int | str) -> None:
    assert values.BUDGET.convert(text, None, None) == value


@pytest.mark.parametrize("text", ["", "many", "-5", "1.5", "200%", "5kk"])
def test_what_is_no_budget_is_wrong_usage(text: str) -> None:
    code, out, err = run("truncate", "x.sdelta", f"--budget={text}")
    assert (code, out) == (2, "")
    assert "Error: Invalid value for '-b' / '--budget': budget " in err


def test_lists_are_separated_by_commas() -> None:
    assert values.BUDGETS.convert("25k,1%", None, None) == (25_000, "1%")
    assert values.NUMBERS.convert("0.5,-1", None, None) == (0.5, -1.0)
    with pytest.raises(click.BadParameter, match="'x' is not a valid float"):
        values.NUMBERS.convert("1,x", None, None)


def test_tables_align_and_hide_no_control_characters() -> None:
    text = options.table([["name", "n"], ["a\x1b[31m", "10"], ["é", "2"]], right=[1])
    assert text == "name        n\na\\x1b[31m  10\né           2"


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    options.print_json({"a": float("nan"), "b": (1.5, float("inf")), "c": Path("x")})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": "x"}
