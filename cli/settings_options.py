"""Command-line options made from the declarations of settings, so that both always agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click

from deltakit.cli.command import Option
from deltakit.cli.options import F
from deltakit.cli.values import FunctionType, Items, completed, paths
from deltakit.errors import DeltakitError
from deltakit.training.config import REQUIRED
from deltakit.training.config_method import METHOD
from deltakit.training.config_run import OPTIMIZATION
from deltakit.training.settings import Setting, parse_setting

REQUIRED_SECTION = "Required"
_FIRST = {REQUIRED_SECTION: 0, METHOD: 1, OPTIMIZATION: 2}  # others stand as they are declared


class SettingType(FunctionType):
    """Reads a setting as its file is read, and completes it."""

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(_reader(name, setting))
        self.setting = setting

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        """The names that it may be, or paths."""
        kind = self.setting.kind
        if kind.metavar in _PATHS:
            suffixes, folders_only = _PATHS[kind.metavar]
            return paths(suffixes, folders_only)
        before, comma, last = incomplete.rpartition(",")
        if comma and not kind.many:
            return []
        return completed([f"{before}{comma}{name}" for name in kind.names()], before + comma + last)


_PATHS = {  # placeholder -> suffixes of files, and whether only folders will do
    "MODEL": ((".safetensors",), False),
    "DELTA": ((".sdelta",), False),
    "DATA": ((), False),
    "RUN": ((), True),
}


def setting_options(
    settings: Iterable[tuple[str, Setting]], section: str | None = None
) -> Callable[[F], F]:
    """Decorator: one option per setting, None unless given, the most used first.

    A list is given by repeating the flag, and an empty one by an empty text. section: of the help,
    by default the setting's group.
    """
    described = sorted(settings, key=lambda each: _FIRST.get(_section(*each), len(_FIRST)))

    def decorate(command: F) -> F:
        for name, setting in reversed(described):
            kind = setting.kind
            command = click.option(
                f"--{name.replace('_', '-')}",
                name,
                cls=Option,
                section=section or _section(name, setting),
                type=SettingType(name, setting),
                metavar=kind.metavar,
                multiple=kind.many,
                default=None,
                help=_help(setting),
            )(command)
        return command

    return decorate


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given as flags, repeated ones as one flat list."""
    flags = {}
    for name, value in values.items():
        if isinstance(value, tuple) and value:
            flags[name] = tuple(item for items in value for item in items)
        elif value is not None and value != ():
            flags[name] = value
    return flags


def _reader(name: str, setting: Setting) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        try:
            return parse_setting(name, setting, value)
        except DeltakitError as error:
            raise click.BadParameter(str(error)) from None

    return read


def _section(name: str, setting: Setting) -> str:
    return REQUIRED_SECTION if name in REQUIRED else setting.group


def _help(setting: Setting) -> str:
    text = setting.about[:1].upper() + setting.about[1:] + "."
    return f"{text} May be repeated." if setting.kind.many else text
