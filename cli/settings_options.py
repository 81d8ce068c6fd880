"""Command-line options made from the declarations of settings, so that both always agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from deltakit.errors import DeltakitError
from deltakit.training.settings import Setting, parse_setting

F = TypeVar("F", bound=Callable[..., Any])


class SettingType(click.ParamType):
    """The value of a setting as the setting's own kind reads it; a mistake is wrong usage."""

    def __init__(self, name: str, described: Setting) -> None:
        self.setting, self.described = name, described
        self.name = described.kind.metavar.lower()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The checked value."""
        try:
            return parse_setting(self.setting, self.described, value)
        except DeltakitError as error:
            self.fail(str(error), param, ctx)


def setting_options(settings: Iterable[tuple[str, Setting]]) -> Callable[[F], F]:
    """Decorator: one option per setting, None unless given.

    A list is given by repeating the flag, and an empty one by an empty text.
    """
    described = list(settings)

    def decorate(command: F) -> F:
        for name, setting in reversed(described):
            kind = setting.kind
            command = click.option(
                f"--{name.replace('_', '-')}",
                name,
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


def _help(setting: Setting) -> str:
    text = setting.about[:1].upper() + setting.about[1:] + "."
    return f"{text} May be repeated." if setting.kind.many else text
