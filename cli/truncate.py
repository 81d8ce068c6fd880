"""`deltakit truncate`: fewer entries, exactly as many as asked for."""

from __future__ import annotations

from pathlib import Path

import click

from deltakit.budget import format_bytes
from deltakit.cli.command import Command
from deltakit.cli.options import (
    Source,
    check_output,
    force_option,
    json_option,
    note,
    output_option,
    print_json,
    progress,
)
from deltakit.cli.values import BASE, BUDGET, DELTA, NEW_DELTA, Choice


@click.command(cls=Command)
@click.argument("delta", type=DELTA)
@click.option(
    "-b",
    "--budget",
    type=BUDGET,
    required=True,
    metavar="N",
    help="Entries to keep: 100k, 2.5m, 5000, or a share of the base such as 0.1%.",
)
@click.option(
    "--by",
    type=Choice(["magnitude", "order"]),
    default="magnitude",
    show_default=True,
    help="Keep the largest changes, or those unmasked first (nested budgets).",
)
@click.option("--base", type=BASE, help="The base, for deltas that do not carry base values.")
@output_option(
    "Where to write; by default DELTA's name with the number of entries, beside it.", kind=NEW_DELTA
)
@force_option
@json_option
def command(
    delta: Source,
    budget: int | str,
    by: str,
    base: Source | None,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Keep the best entries of a delta, exactly.

    Writes a delta of exactly N entries (or all of them, where DELTA has fewer). Ties break by
    tensor order, then by lower index, so the same command gives the same bytes everywhere. 0.1% is
    a share of all weights of the base, or of the adapter's own for the delta of an adapter.

    \b
    Examples:
      deltakit truncate delta.sdelta --budget 100k
      deltakit truncate delta.sdelta --budget 0.1% --by order -o small.sdelta
    """
    from deltakit.formats.sdelta import load, save
    from deltakit.hub.locate import local_delta, named_after
    from deltakit.truncation import truncate

    file = local_delta(delta)
    if output is not None:
        check_output(output, [file], force)
    with progress("Reading") as advance:
        whole = load(file, progress=advance)
    small = truncate(whole, budget, "order" if by == "order" else "magnitude", base)
    named = named_after(delta, ".sdelta")
    target = output or named.with_name(f"{named.stem}-{small.nnz}.sdelta")
    check_output(target, [file], force)
    with progress("Writing") as advance:
        save(small, target, values=_stored_as(file), progress=advance)
    size = target.stat().st_size
    if as_json:
        print_json({"output": target, "entries": small.nnz, "of": whole.nnz, "bytes": size})
        return
    if small.nnz == whole.nnz:
        note(f"{delta} has {whole.nnz:,} entries, within the budget: nothing was dropped.")
    click.echo(f"{target}: {small.nnz:,} of {whole.nnz:,} entries by {by}, {format_bytes(size)}")


def _stored_as(delta: Path) -> str | None:
    """The dtype in which the file stores its add values, so that they stay as small as they are;
    None, which loses nothing, where tensors differ."""
    from deltakit.formats.sdelta import SdeltaFile

    with SdeltaFile(delta) as file:
        found = {record.value_dtype for record in file.tensors.values() if record.mode == "add"}
    return found.pop() if len(found) == 1 and found <= {"bfloat16", "float16"} else None
