"""What the commands share: options, notes, progress and tables."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import click

from deltakit.cli.terminal import marked
from deltakit.cli.values import PATH, SHARD, LocalPath
from deltakit.errors import OutputError
from deltakit.formats.atomic import refuse_existing

F = TypeVar("F", bound=Callable[..., Any])
_PATIENCE = 0.5  # seconds without a bar
Source = Path | str  # a local path, or an hf:// location as text, as pathlib would break that


def _set_quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().meta["deltakit.quiet"] = True
        _no_download_bars()


def _set_json(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    if value:
        _no_download_bars()
    return value


def _no_download_bars() -> None:
    """Tell huggingface_hub, which is imported later and only for what is on the Hub."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


quiet_option = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=_set_quiet,
    help="No notes and no progress on stderr.",
)
json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    callback=_set_json,
    help="Print JSON and nothing else on stdout; errors stay a line on stderr.",
)
force_option = click.option("--force", is_flag=True, help="Replace an output that exists.")
mismatch_option = click.option(
    "--allow-base-mismatch",
    is_flag=True,
    help="Use a base that is not the delta's own; a note tells what differs.",
)


def shard_option(what: str) -> Callable[[F], F]:
    """`--shard I/N`, with `what` telling which share of the work job I of N does."""
    return click.option("--shard", type=SHARD, metavar="I/N", help=what)


def workers_option(what: str) -> Callable[[F], F]:
    """`--workers N`, with `what` telling what is worked on at a time."""
    return click.option("--workers", type=click.IntRange(1), metavar="N", help=what)


def output_option(what: str, required: bool = False, kind: LocalPath = PATH) -> Callable[[F], F]:
    """`-o/--output`, with `what` telling what is written and the name that it gets by default."""
    return click.option("-o", "--output", type=kind, required=required, help=what)


def check_output(output: Path, inputs: Iterable[Source], force: bool) -> None:
    """Raise OutputError for an output that is one of the inputs, or exists without --force."""
    for given in inputs:
        same = isinstance(given, Path) and given.exists() and output.exists()
        if same and output.samefile(given):
            raise OutputError(f"{output} is a delta to be read; give another output")
    refuse_existing(output, force)


def is_quiet() -> bool:
    """Whether -q was given, before or after the name of the command."""
    ctx = click.get_current_context(silent=True)
    return ctx is not None and bool(ctx.find_root().meta.get("deltakit.quiet"))


def note(text: str) -> None:
    """One line for the reader on stderr, unless -q was given."""
    if not is_quiet():
        click.echo(marked(text), err=True)


def print_json(data: Any) -> None:
    """Print strict JSON on stdout: numbers that JSON lacks (NaN, infinities) become null.

    Characters that the encoding of stdout lacks are escaped as JSON has it.
    """
    text = json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(_finite(data), indent=2, allow_nan=False)
    click.echo(text)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return str(data) if isinstance(data, Path) else data


def count(noun: str, things: Sized) -> str:
    """`1 file`, `2 files`."""
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def printable(text: str) -> str:
    """The text with control characters escaped: names in files from strangers reach terminals."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Rows of text as aligned columns, a heading first if there is one.

    right: the positions of columns of numbers, which align at their ends.
    """
    numeric = set(right)
    columns = [_aligned(c, i in numeric) for i, c in enumerate(zip(*rows, strict=True))]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def _aligned(column: Sequence[str], right: bool) -> list[str]:
    cells = [printable(cell) for cell in column]
    width = max(len(cell) for cell in cells)
    return [cell.rjust(width) if right else cell.ljust(width) for cell in cells]


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr as a callback (done, total); None without a terminal or with -q.

    What takes less than half a second after the first call shows none.
    """
    if is_quiet() or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=None)
    first: float | None = None  # what is on the Hub is downloaded before, under a bar of its own

    def advance(done: int, total: int) -> None:
        nonlocal first
        first = monotonic() if first is None else first
        if monotonic() - first > _PATIENCE:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        bar.stop()
