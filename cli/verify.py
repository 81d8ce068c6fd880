"""`deltakit verify`: are the bytes of a delta what they were, and does the base fit?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from deltakit.cli.command import Command
from deltakit.cli.options import (
    Source,
    json_option,
    note,
    print_json,
    printable,
    progress,
    shard_option,
    workers_option,
)
from deltakit.cli.values import BASE, DELTA

if TYPE_CHECKING:
    from deltakit.shares import Shard


@click.command(cls=Command)
@click.argument("delta", type=DELTA)
@click.option("--base", type=BASE, help="A checkpoint that must be the delta's base.")
@click.option(
    "--recorded-base",
    is_flag=True,
    help="The base is the repository and commit that the delta records.",
)
@workers_option("Tensors checked at a time; 1 by default.")
@shard_option("Check share I of N of the tensors, as one job of an array.")
@click.option(
    "--keep-base/--no-keep-base",
    default=True,
    help="Let go of each weight file of a base on the Hub once it is checked, unless the cache had it "
    "before; kept by default.",
)
@json_option
def command(
    delta: Source,
    base: Source | None,
    recorded_base: bool,
    workers: int | None,
    shard: Shard | None,
    keep_base: bool,
    as_json: bool,
) -> None:
    """Check a delta's bytes, and its base if given.

    Reads the whole file against its digests and the rules of the format. With --base, or with
    --recorded-base, which downloads it unless the cache has it, names, shapes, dtypes and base values
    are compared as merging would; of a base on the Hub the weight files that DELTA touches come one by
    one. With --shard I/N only that share of the tensors is checked. An adapter's initial values are made
    anew and held against its check value (DoRA needs the base for that). Exits with 1 when anything is
    wrong.

    \b
    Examples:
      deltakit verify delta.sdelta
      deltakit verify delta.sdelta --base model/
      deltakit verify hf://owner/delta --recorded-base
      deltakit verify delta.sdelta --base model/ --shard 3/8
    """
    if base is not None and recorded_base:
        raise click.UsageError("--base and --recorded-base name two bases; give one")
    from deltakit.verification import verify

    with progress("Checking") as advance:
        found = verify(
            delta,
            base,
            recorded_base=recorded_base,
            workers=workers,
            shard=shard,
            keep_base=keep_base,
            progress=advance,
        )
    if as_json:
        print_json({"path": delta, **found.as_dict()})
    else:
        for told in found.notes:
            note(f"Note: {told}")
        if found.problems:
            more = len(found.problems) - 1
            rest = f"; and {more} more such problems (--json lists all)" if more else ""
            click.echo(f"Error: {printable(found.problems[0])}{rest}", err=True)
    if not found.ok:
        click.get_current_context().exit(1)
    if not as_json:
        fits = "" if found.base is None else f", and {base or found.base} is its base"
        share = "" if found.shard is None else f"shard {found.shard} is "
        click.echo(
            f"{delta}: {share}sound{fits}; {found.entries:,} entries, sparse tensors: {found.tensors:,}, "
            f"extras: {found.extras:,}"
        )
