"""`deltakit diff`: the exact difference of two checkpoints as a delta."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deltakit.budget import format_bytes
from deltakit.cli.command import Command
from deltakit.cli.options import (
    Source,
    count,
    force_option,
    json_option,
    note,
    output_option,
    print_json,
    progress,
    shard_option,
    workers_option,
)
from deltakit.cli.values import BASE, BUDGET, NEW_DELTA, Choice
from deltakit.formats.atomic import refuse_existing

if TYPE_CHECKING:
    from deltakit.shares import Shard


@click.command(cls=Command)
@click.argument("base", type=BASE)
@click.argument("tuned", type=BASE)
@output_option("The .sdelta file to write.", required=True, kind=NEW_DELTA)
@click.option(
    "--mode",
    type=Choice(["set", "add"]),
    default="set",
    show_default=True,
    help="Store the tuned bits, or differences where those give the bits back.",
)
@click.option(
    "-b",
    "--budget",
    type=BUDGET,
    metavar="N",
    help="Keep the N largest changes only: 100k, 2.5m, 5000, or a share of the base such as 0.1%.",
)
@click.option(
    "--density",
    type=float,
    metavar="SHARE",
    help="The same as a number: 0.001 keeps as many as 0.1% of the base's weights.",
)
@click.option(
    "--no-base-values",
    is_flag=True,
    help="Do not keep the base's bits beside; weights and truncation then need the base.",
)
@click.option(
    "--ignore-missing", is_flag=True, help="Leave tensors that TUNED lacks as they are in BASE."
)
@workers_option("Tensors compared at a time; 1 by default.")
@shard_option(
    "Compare share I of N of the tensors, as one job of an array; the last joins the parts."
)
@click.option(
    "--keep-downloads/--no-keep-downloads",
    default=True,
    help="Let go of each weight file of a side on the Hub once it is compared, unless the cache had "
    "it before; kept by default.",
)
@force_option
@json_option
def command(
    base: Source,
    tuned: Source,
    output: Path,
    mode: str,
    budget: int | str | None,
    density: float | None,
    no_base_values: bool,
    ignore_missing: bool,
    workers: int | None,
    shard: Shard | None,
    keep_downloads: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Take the exact difference of two checkpoints.

    BASE and TUNED are .safetensors files or folders, single, sharded or as
    torch.distributed.checkpoint saves them (FSDP). Every element whose bits differ becomes an entry,
    so merging the delta into BASE gives TUNED's tensors back, bit for bit.
    New tensors, and rows appended to a tensor (new tokens), are kept whole beside the entries.
    --budget or --density keep the largest changes instead, and merging then comes near TUNED only.

    With --shard I/N it is one job of an array, at any time and on any machine that sees the same
    files. Each writes a part beside the output, and the last one to finish joins the parts into it. A
    job that is run again does what is missing.

    \b
    Examples:
      deltakit diff base.safetensors tuned.safetensors -o tuned.sdelta
      deltakit diff model/ tuned/ -o tuned.sdelta --mode add
      deltakit diff model/ tuned/ -o small.sdelta --budget 100k
      deltakit diff model/ tuned/ -o tuned.sdelta --shard 3/8
    """
    if shard is None:
        refuse_existing(output, force)
    from deltakit.diffing.diff import diff

    with progress("Comparing") as advance:
        report = diff(
            base,
            tuned,
            mode="add" if mode == "add" else "set",
            keep_base=not no_base_values,
            missing="ignore" if ignore_missing else "error",
            budget=budget,
            density=density,
            out=output,
            progress=advance,
            workers=workers,
            shard=shard,
            force=force,
            keep_downloads=keep_downloads,
        )
    for told in report.notes:
        note(f"Note: {told}")
    if as_json:
        print_json(report.as_dict())
        return
    if report.share is not None:
        click.echo(f"{output}: {report.share}")
    of = f" of {report.differing:,}" if report.entries < report.differing else ""
    click.echo(
        f"{report.output}: {report.entries:,}{of} entries in {report.tensors:,} "
        f"tensor{'' if report.tensors == 1 else 's'}, {count('extra', report.extras)}, "
        f"{format_bytes(report.bytes)}"
    )
