"""Command-line options made from the declarations of settings, so that both always agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from deltakit.errors import DeltakitError
from deltakit.training.settings import Setting, parse_setting

F = TypeVar("F", bound=Callable[..., Any])


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
                type=_reader(name, setting),
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


def _help(setting: Setting) -> str:
    text = setting.about[:1].upper() + setting.about[1:] + "."
    return f"{text} May be repeated." if setting.kind.many else text
