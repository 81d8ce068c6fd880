"""Help: its examples can be typed, its sections hold every option once, the most used first."""

from __future__ import annotations

import inspect
import re
import shlex

import click
import pytest
from click.testing import CliRunner

from deltakit.cli.command import section_of
from deltakit.cli.main import COMMANDS, main
from deltakit.training.config import REQUIRED, describe

_CALL = re.compile(r'\bdeltakit (.+?)(?: [|>] .*|\)"|)$')


def command_called(name: str) -> click.Command:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    return command


def examples(name: str) -> list[str]:
    """What stands behind `deltakit` in the lines of the examples, in the order of the help."""
    text = inspect.cleandoc(command_called(name).help or "").replace("\\\n", " ")
    _, heading, listed = text.partition("\b\nExamples:\n")
    assert heading, f"{name} has no examples"
    calls = [_CALL.search(line) for line in listed.splitlines() if line.strip()]
    assert all(calls), listed
    return [call[1] for call in calls if call]


def parse(line: str) -> None:
    """Parse a call as click does before it runs a command; raises click.UsageError."""
    name, *arguments = shlex.split(line)
    with main.make_context("deltakit", [name]) as parent:
        try:
            command_called(name).make_context(name, arguments, parent)
        except click.exceptions.Exit as asked:  # options such as --list-methods end here
            assert asked.exit_code == 0


@pytest.mark.parametrize("name", list(COMMANDS))
def test_examples_can_be_typed(name: str) -> None:
    """At least two, all of this command, and every one is read without complaint."""
    lines = examples(name)
    assert len(lines) >= 2
    for line in lines:
        parse(line)
    assert {line.split()[0] for line in lines} <= {name, "train"}


def test_an_example_that_has_rotted_is_found() -> None:
    with pytest.raises(click.UsageError):
        parse("truncate delta.sdelta --buget 3")
    with pytest.raises(click.UsageError):
        parse("truncate delta.sdelta --budget much")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_option_is_in_the_help_once(name: str) -> None:
    shown = CliRunner().invoke(main, [name, "--help"], terminal_width=100).stdout
    _, _, sections = shown.partition("\n  Examples:\n")
    listed = re.findall(r"^  (?:-\w, )?(--[\w-]+)", sections, re.MULTILINE)
    options = [p for p in command_called(name).params if isinstance(p, click.Option)]
    assert sorted(listed) == sorted([*(p.opts[-1] for p in options), "--help"])


@pytest.mark.parametrize("name", ["train", "lr-find", "sweep"])
def test_settings_stand_in_their_groups_after_those_that_every_run_needs(name: str) -> None:
    shown = CliRunner().invoke(main, [name, "--help"], terminal_width=100).stdout
    titles = re.findall(r"^([A-Z][^:\n]+):$", shown, re.MULTILINE)
    groups = list(dict.fromkeys(setting.group for setting in describe().values()))
    settings = [title for title in titles if title in groups]
    assert settings[:2] == ["Method", "Optimization"]
    assert sorted(settings) == sorted(groups)
    assert titles.index("Required") < titles.index("Method")
    assert titles[-1] == "Options"
    for parameter in command_called(name).params:
        setting = describe().get(parameter.name or "")
        if setting is not None and name == "train":
            expected = "Required" if parameter.name in REQUIRED else setting.group
            assert section_of(parameter) == expected
