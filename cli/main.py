"""The `deltakit` command. Commands are loaded when they are used, so that help costs nothing."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any, NamedTuple, NoReturn, TypeVar

import click

from deltakit import __version__
from deltakit.cli.options import note, printable, quiet_option
from deltakit.errors import DeltakitError, nearest

T = TypeVar("T")


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
}

# Installed by the extras that stand here; a missing one is told with the way to get it.
_OPTIONAL = {
    "accelerate": "train",
    "datasets": "train",
    "matplotlib": "plot",
    "scipy": "train",
    "sklearn": "train",
    "torch": "train",
    "transformers": "train",
}


class LazyGroup(click.Group):
    """A group whose commands stand in a table and are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now; None when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name].module).command
        if all(parameter.name != "quiet" for parameter in command.params):
            quiet_option(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, but a command that does not exist is answered with the nearest."""
        name = click.utils.make_str(args[0])
        if name not in COMMANDS and not name.startswith("-"):
            hint = nearest(name, self.list_commands(ctx), 1) or f"; known: {', '.join(COMMANDS)}"
            ctx.fail(f"no command {name!r}{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what the user can mend becomes one line on stderr and exit code 1."""
        if os.environ.get("NO_COLOR"):
            ctx.color = False
        _stop_by_exception()
        with _logged_as_notes():
            if os.environ.get("DELTAKIT_DEBUG"):
                return super().invoke(ctx)
            return _explained(ctx, lambda: super(LazyGroup, self).invoke(ctx))


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


def _explained(ctx: click.Context, run: Callable[[], T]) -> T:
    try:
        return run()
    except DeltakitError as error:
        raise click.ClickException(_one_line(error)) from None
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _OPTIONAL:
            raise
        raise click.ClickException(
            f"this needs {library}, which is not installed; "
            f"pip install 'deltakit-sparse[{_OPTIONAL[library]}]'"
        ) from None
    except BrokenPipeError:
        raise  # the reader of stdout has gone; click ends quietly
    except OSError as error:
        raise click.ClickException(_system_error(error)) from None
    except MemoryError as error:
        raise click.ClickException(_one_line(error) or "out of memory") from None
    except KeyboardInterrupt:
        note("Interrupted.")
        ctx.exit(130)


def _stop_by_exception() -> None:
    """Let SIGTERM unwind like Ctrl-C does, so that no temporary file is left behind."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _one_line(error: BaseException) -> str:
    return printable(" ".join(str(error).split()))


def _system_error(error: OSError) -> str:
    """`permission denied: out.sdelta`, from an error of the operating system."""
    what = (error.strerror or _one_line(error)).strip()
    names = [os.fspath(n) for n in (error.filename, error.filename2) if isinstance(n, (str, bytes))]
    where = " -> ".join(os.fsdecode(name) for name in names)
    told = f"{what[:1].lower()}{what[1:]}"
    return printable(f"{told}: {where}" if where else told)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(
    __version__, "--version", prog_name="deltakit", message="%(prog)s %(version)s"
)
@quiet_option
def main() -> None:
    """Sparse fine-tuning deltas: train, inspect, truncate and merge, bit for bit.

    Results go to stdout, notes and progress to stderr. Exit codes: 0 done, 1 an error told in one
    line, 2 wrong usage, 130 interrupted.
    """
