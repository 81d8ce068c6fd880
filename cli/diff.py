"""`deltakit diff`: the exact difference of two checkpoints as a delta."""

from __future__ import annotations

from pathlib import Path

import click

from deltakit.budget import format_bytes
from deltakit.cli.options import (
    PATH,
    count,
    force_option,
    json_option,
    output_option,
    print_json,
    progress,
)
from deltakit.formats.atomic import refuse_existing


@click.command()
@click.argument("base", type=PATH)
@click.argument("tuned", type=PATH)
@output_option("The .sdelta file to write.", required=True)
@click.option(
    "--mode",
    type=click.Choice(["set", "add"]),
    default="set",
    show_default=True,
    help="Store the tuned bits, or differences where those give the bits back.",
)
@click.option(
    "--no-base-values",
    is_flag=True,
    help="Do not keep the base's bits beside; weights and truncation then need the base.",
)
@click.option(
    "--ignore-missing", is_flag=True, help="Leave tensors that TUNED lacks as they are in BASE."
)
@force_option
@json_option
def command(
    base: Path,
    tuned: Path,
    output: Path,
    mode: str,
    no_base_values: bool,
    ignore_missing: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Take the exact difference of two checkpoints.

    BASE and TUNED are .safetensors files or folders, single or sharded. Every element whose bits
    differ becomes an entry, so merging the delta into BASE gives TUNED's tensors back, bit for bit.

    \b
    Examples:
      deltakit diff base.safetensors tuned.safetensors -o tuned.sdelta
      deltakit diff model/ tuned/ -o tuned.sdelta --mode add
    """
    refuse_existing(output, force)
    from deltakit.diffing import diff
    from deltakit.formats.sdelta import save

    with progress("Comparing") as advance:
        delta = diff(
            base,
            tuned,
            mode="add" if mode == "add" else "set",
            keep_base=not no_base_values,
            missing="ignore" if ignore_missing else "error",
            progress=advance,
        )
    save(delta, output)
    size = output.stat().st_size
    if as_json:
        told = {"output": output, "entries": delta.nnz, "tensors": len(delta.tensors)}
        print_json(told | {"extras": list(delta.extras), "bytes": size})
        return
    click.echo(
        f"{output}: {delta.nnz:,} entries in {count('tensor', delta.tensors)}, "
        f"{count('extra', delta.extras)}, {format_bytes(size)}"
    )
