"""`deltakit verify`: are the bytes of a delta what they were, and does the base fit?"""

from __future__ import annotations

import click

from deltakit.cli.command import Command
from deltakit.cli.options import Source, json_option, note, print_json, printable, progress
from deltakit.cli.values import BASE, DELTA


@click.command(cls=Command)
@click.argument("delta", type=DELTA)
@click.option("--base", type=BASE, help="A checkpoint that must be the delta's base.")
@click.option(
    "--recorded-base",
    is_flag=True,
    help="The base is the repository and commit that the delta records.",
)
@json_option
def command(delta: Source, base: Source | None, recorded_base: bool, as_json: bool) -> None:
    """Check a delta's bytes, and its base if given.

    Reads the whole file against its digests and the rules of the format. With --base, or with
    --recorded-base, which downloads it unless the cache has it, names, shapes, dtypes and base values
    are compared as merging would. An adapter's initial values are made
    anew and held against its check value (DoRA needs the base for that). Exits with 1 when anything is
    wrong.

    \b
    Examples:
      deltakit verify delta.sdelta
      deltakit verify delta.sdelta --base model/
      deltakit verify hf://owner/delta --recorded-base
    """
    if base is not None and recorded_base:
        raise click.UsageError("--base and --recorded-base name two bases; give one")
    from deltakit.verification import verify

    with progress("Checking") as advance:
        found = verify(delta, base, recorded_base=recorded_base, progress=advance)
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
        click.echo(
            f"{delta}: sound{fits}; {found.entries:,} entries, sparse tensors: {found.tensors:,}, "
            f"extras: {found.extras:,}"
        )
