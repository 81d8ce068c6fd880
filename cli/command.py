"""How every command is shaped: options in sections, headings, -q, and mistakes told in one line."""

from __future__ import annotations

import sys
from typing import IO, Any

import click

from deltakit.cli.options import quiet_option
from deltakit.cli.terminal import asked_colour, marked, styled
from deltakit.errors import nearest

OPTIONS = "Options"


class Formatter(click.HelpFormatter):
    """Help whose headings stand out on terminals."""

    def write_heading(self, heading: str) -> None:
        """One heading."""
        super().write_heading(styled(heading, bold=True))


class Context(click.Context):
    """The context of all commands."""

    formatter_class = Formatter


class Option(click.Option):
    """An option that stands in a section of the help."""

    def __init__(self, *names: Any, section: str = OPTIONS, **given: Any) -> None:
        super().__init__(*names, **given)
        self.section = section


class Command(click.Command):
    """A command that takes -q and shows its options in sections, in order of first appearance."""

    context_class = Context

    def __init__(self, *names: Any, **given: Any) -> None:
        super().__init__(*names, **given)
        quiet_option(self)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section after the other."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            told = parameter.get_help_record(ctx)
            if told is not None and isinstance(parameter, click.Option):
                sections.setdefault(section_of(parameter), []).append(told)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


class Misuse(click.UsageError):
    """Wrong usage as it is shown: how the command is called, and one line about what is wrong."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it, to stderr."""
        stream = sys.stderr if file is None else file
        if self.ctx is not None:
            click.echo(f"{self.ctx.get_usage()}\n{_try(self.ctx)}\n", file=stream)
        click.echo(marked(f"Error: {self.format_message()}"), file=stream, color=asked_colour())


def misuse(error: click.UsageError) -> Misuse:
    """An error of click as it is shown; options that do not exist with the nearest that do."""
    told = error.format_message()
    if isinstance(error, click.NoSuchOption):
        known = [] if error.ctx is None else _flags(error.ctx)
        told = f"no option {error.option_name!r}{nearest(error.option_name, known, 1)}"
    return Misuse(told, error.ctx)


def section_of(parameter: click.Parameter) -> str:
    """The title of the section in which the help shows an option."""
    return parameter.section if isinstance(parameter, Option) else OPTIONS


def _flags(ctx: click.Context) -> list[str]:
    return [flag for p in ctx.command.get_params(ctx) for flag in (*p.opts, *p.secondary_opts)]


def _try(ctx: click.Context) -> str:
    return f"Try '{ctx.command_path} --help' for help."
