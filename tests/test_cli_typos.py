"""What is misspelt is answered in one line with the nearest that exists, over all registries."""

from __future__ import annotations

from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from deltakit.adapters.kinds import KINDS
from deltakit.cli.main import COMMANDS, main
from deltakit.cli.values import Choice
from deltakit.combine import METHODS as STACKING
from deltakit.errors import ConfigError
from deltakit.formats.bridges import BRIDGES
from deltakit.registry import Registry, declared
from deltakit.selection import HEURISTICS, METHODS
from deltakit.selection.schedules import SCHEDULES
from deltakit.training.config import check_names, describe
from deltakit.training.peers import PEERS
from deltakit.training.settings import parse_setting
from deltakit.training.tasks import TASKS

REGISTRIES: list[Registry[Any]] = [
    *(METHODS, HEURISTICS, SCHEDULES, STACKING, BRIDGES, KINDS, TASKS, PEERS)
]
DECLARED = {
    ("deltakit.selection", "METHODS"): METHODS,
    ("deltakit.selection", "HEURISTICS"): HEURISTICS,
    ("deltakit.selection", "SCHEDULES"): SCHEDULES,
    ("deltakit.combine", "METHODS"): STACKING,
    ("deltakit.formats.bridges", "BRIDGES"): BRIDGES,
    ("deltakit.training", "PEERS"): PEERS,
}


def misspelt(name: str) -> str:
    """The name with the last two characters the other way round, or one of them twice."""
    swapped = f"{name[:-2]}{name[-1]}{name[-2]}"
    return swapped if swapped != name else f"{name}{name[-1]}"


def options() -> list[tuple[str, str]]:
    """Every command with every long option of it."""
    found = []
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        for parameter in command.params:
            flags = [f for f in (*parameter.opts, *parameter.secondary_opts) if f[:2] == "--"]
            found += [(name, flag) for flag in flags if len(flag) > 4]
    return found


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, list(arguments))
    return done.exit_code, done.stdout, done.stderr.rstrip("\n").rpartition("\n")[2]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_commands(name: str) -> None:
    wrong = misspelt(name)
    assert run(wrong) == (2, "", f"Error: no command {wrong!r}; nearest: {name}")


def test_options_of_every_command() -> None:
    """The option that was meant, or one that looks at least as much like what was typed."""
    for name, flag in options():
        wrong = f"--{flag[3]}{flag[2]}{flag[4:]}"
        if wrong == flag:
            continue
        code, out, line = run(name, wrong)
        said, _, found = line.partition("; nearest: ")
        assert (code, out, said) == (2, "", f"Error: no option {wrong!r}")
        alike = [SequenceMatcher(None, each, wrong).ratio() for each in (found, flag)]
        assert found == flag or alike[0] >= alike[1], (name, wrong, found)


def test_options_of_all_commands() -> None:
    assert run("--qiet") == (2, "", "Error: no option '--qiet'; nearest: --quiet")


def test_choices_of_every_command() -> None:
    """None is a bare click.Choice, which would not tell the nearest."""
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        for parameter in command.params:
            if not isinstance(parameter.type, click.Choice):
                continue
            assert isinstance(parameter.type, Choice), (name, parameter.name)
            for choice in parameter.type.choices:
                with pytest.raises(click.BadParameter, match=f"; nearest: {choice}$"):
                    parameter.type.convert(misspelt(choice), parameter, None)


def test_a_choice_is_wrong_usage() -> None:
    code, out, line = run("truncate", "x.sdelta", "-b", "5", "--by", "ordre")
    assert (code, out) == (2, "")
    assert line.endswith("'ordre' is not one of magnitude, order; nearest: order")


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.family)
def test_names_of_registries(registry: Registry[Any]) -> None:
    for name in registry.names():
        with pytest.raises(ConfigError) as told:
            registry[misspelt(name)]
        _, _, near = str(told.value).partition("; nearest: ")
        assert name in near.split(", "), told.value


def test_settings_that_are_one_of_some_names() -> None:
    """As flags and in files alike: both are read by the kind of the setting."""
    tried = 0
    for name, setting in describe().items():
        for known in setting.kind.names():
            if setting.kind.metavar.startswith(("PATTERN", "X", "NAME|PATTERN")) or len(known) < 5:
                continue
            with pytest.raises(ConfigError, match=f"^setting {name}: ") as told:
                parse_setting(name, setting, misspelt(known))
            assert known in str(told.value), (name, known)
            tried += 1
    assert tried > 100


@pytest.mark.parametrize("name", [name for name in describe() if len(name) > 3])
def test_names_of_settings(name: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown setting .*; nearest: .*{name}"):
        check_names({misspelt(name): 1}, "run.yaml")


def test_settings_in_a_file_and_formats_are_typed_errors(tmp_path: Path, delta_file: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("budgte: 5\n")
    line = f"Error: {config}: unknown setting 'budgte'; nearest: budget"
    code, out, told = run("train", str(config))
    assert (code, out, told.startswith(line)) == (1, "", True)
    code, _, told = run("convert", str(delta_file), "out", "--to", "peft-shria")
    assert (code, told.partition(", ")[0]) == (
        1,
        "Error: unknown format 'peft-shria'; nearest: peft-shira",
    )
    code, _, told = run("stack", str(delta_file), "gone.sdelta", "--method", "tise")
    assert (code, told) == (1, "Error: unknown stacking method 'tise'; nearest: ties, sce")


@pytest.mark.parametrize(("place", "registry"), DECLARED.items(), ids=map(".".join, DECLARED))
def test_names_told_without_importing_are_those_registered(
    place: tuple[str, str], registry: Registry[Any]
) -> None:
    assert declared(*place) == sorted(registry.names())
