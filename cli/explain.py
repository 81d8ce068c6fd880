"""What goes wrong, and interruptions, as one line on stderr and an exit code."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any, NoReturn

import click

from deltakit.cli.options import printable
from deltakit.cli.terminal import asked_colour, marked
from deltakit.errors import DeltakitError

TERMINATED = 128 + signal.SIGTERM

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

# Told by words: errors are explained without torch, whose CPU raises a plain RuntimeError anyway.
_TORCH_LACKS_MEMORY = re.compile(r"out of memory|can't allocate memory")


class Failure(click.ClickException):
    """What the user can mend, told in one line; the exit code is 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it, to stderr."""
        stream = sys.stderr if file is None else file
        click.echo(marked(f"Error: {self.message}"), file=stream, color=asked_colour())


@contextmanager
def explained(ctx: click.Context) -> Iterator[None]:
    """Turn exceptions that are no defects into a line on stderr and an exit code."""
    try:
        yield
    except DeltakitError as error:
        raise Failure(_one_line(error)) from None
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _OPTIONAL:
            raise
        raise Failure(
            f"this needs {library}, which is not installed; "
            f"pip install 'deltakit-sparse[{_OPTIONAL[library]}]'"
        ) from None
    except BrokenPipeError:
        raise  # the reader of stdout has gone; click ends quietly
    except OSError as error:
        raise Failure(_system_error(error)) from None
    except MemoryError as error:
        raise Failure(_one_line(error) or "out of memory") from None
    except RuntimeError as error:
        if not _TORCH_LACKS_MEMORY.search(str(error)):
            raise
        raise Failure(
            "out of memory: lower batch_size (gradient_accumulation makes up for it) or max_length, "
            f"or hold the base quantised (quantize); torch says: {_one_line(error)[:200]}"
        ) from None
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        ctx.exit(128 + signal.SIGINT)
    except SystemExit as stop:
        if stop.code == TERMINATED:
            click.echo("Terminated.", err=True)
        raise


def stop_by_exception() -> None:
    """Let SIGTERM unwind like Ctrl-C does, so that no temporary file is left behind."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)


def _one_line(error: BaseException) -> str:
    return printable(" ".join(str(error).split()))


def _system_error(error: OSError) -> str:
    """`permission denied: out.sdelta`, from an error of the operating system."""
    what = (error.strerror or _one_line(error)).strip()
    names = [os.fspath(n) for n in (error.filename, error.filename2) if isinstance(n, (str, bytes))]
    where = " -> ".join(os.fsdecode(name) for name in names)
    told = f"{what[:1].lower()}{what[1:]}"
    return printable(f"{told}: {where}" if where else told)
