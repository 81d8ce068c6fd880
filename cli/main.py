"""The `deltakit` command. Commands are loaded when they are used, so that help costs nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from deltakit import __version__
from deltakit.cli.command import Context, misuse
from deltakit.cli.explain import explained, stop_by_exception
from deltakit.cli.options import note, quiet_option
from deltakit.cli.terminal import asked_colour, show_what_can_be_shown
from deltakit.errors import nearest


class Entry(NamedTuple):
    """Where a command lives and the line that stands for it in the list of commands."""

    module: str  # holds a click command called `command`
    summary: str


COMMANDS = {
    "demo": Entry("deltakit.cli.demo", "The whole story on an embedded model, in minutes."),
    "train": Entry("deltakit.cli.train", "Fine-tune an exactly budgeted set of weights."),
    "sweep": Entry("deltakit.cli.sweep", "Train over a grid of eps and exp."),
    "lr-find": Entry("deltakit.cli.lr_find", "Find the learning rate by a short sweep."),
    "evaluate": Entry("deltakit.cli.evaluate", "Measure a base with deltas applied."),
    "inspect": Entry("deltakit.cli.inspect", "Show what a delta holds and what it costs."),
    "truncate": Entry("deltakit.cli.truncate", "Keep the best entries of a delta, exactly."),
    "merge": Entry("deltakit.cli.merge", "Write a base with deltas merged into it."),
    "stack": Entry("deltakit.cli.stack", "Make one delta of several."),
    "revert": Entry("deltakit.cli.revert", "Take merges in place back, bit for bit."),
    "compare": Entry("deltakit.cli.compare", "Tell how deltas overlap and disagree."),
    "diff": Entry("deltakit.cli.diff", "Take the exact difference of two checkpoints."),
    "convert": Entry("deltakit.cli.convert", "Convert deltas from and to the formats of others."),
    "verify": Entry("deltakit.cli.verify", "Check a delta's bytes, and its base if given."),
    "push": Entry("deltakit.cli.push", "Publish deltas, a run or a model on the Hub."),
    "pull": Entry("deltakit.cli.pull", "Get a delta from the Hub, whole and checked."),
    "completion": Entry("deltakit.cli.completion", "Let a shell complete what is typed."),
}

_COMPLETING = "_DELTAKIT_COMPLETE"  # set by the scripts that `deltakit completion` prints
_LIBRARIES = ("numpy", "torch", "transformers")


class LazyGroup(click.Group):
    """A group whose commands stand in a table and are imported on use."""

    context_class = Context

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run as a program, or answer a shell that completes."""
        if _COMPLETING in os.environ:
            import_module("deltakit.cli.shells")
        show_what_can_be_shown()
        return super().main(*args, **extra)

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """With colours as the environment asks for; `help merge` is `merge --help`."""
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        try:
            return super().make_context(info_name, args, parent, color=asked_colour(), **extra)
        except click.UsageError as error:
            raise misuse(error) from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now; None when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name].module).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, but a command that does not exist is answered with the nearest."""
        name = click.utils.make_str(args[0])
        if name not in COMMANDS and not name.startswith("-"):
            if ctx.resilient_parsing:
                return None, None, []
            hint = nearest(name, self.list_commands(ctx), 1) or f"; known: {', '.join(COMMANDS)}"
            ctx.fail(f"no command {name!r}{hint}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Commands from the table alone, and options."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return [
            CompletionItem(name, help=entry.summary)
            for name, entry in COMMANDS.items()
            if name.startswith(incomplete)
        ]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what the user can mend becomes one line on stderr and exit code 1."""
        stop_by_exception()
        told = nullcontext() if os.environ.get("DELTAKIT_DEBUG") else explained(ctx)
        with _logged_as_notes(), told:
            try:
                return super().invoke(ctx)
            except click.UsageError as error:
                raise misuse(error) from None


class _Notes(logging.Handler):
    """Shows what the library logs as notes, which -q keeps back."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line on stderr."""
        note(f"Note: {record.getMessage()}")


@contextmanager
def _logged_as_notes() -> Iterator[None]:
    handler, logger = _Notes(), logging.getLogger("deltakit")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from platform import python_version

    click.echo(f"deltakit {__version__}")
    click.echo(", ".join([f"Python {python_version()}", *map(_release, _LIBRARIES)]))
    ctx.exit()


def _release(library: str) -> str:
    """`torch 2.9.1`, from what is installed; it is not imported."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return f"no {library}"


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the versions of deltakit and of what it stands on, and exit.",
)
@quiet_option
@click.pass_context
def main(ctx: click.Context) -> None:
    """Sparse fine-tuning deltas: train, inspect, truncate and merge, bit for bit.

    Results go to stdout, notes and progress to stderr. Exit codes: 0 done, 1 an error told in one
    line, 2 wrong usage, 130 interrupted, 143 terminated. deltakit help COMMAND tells more.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
