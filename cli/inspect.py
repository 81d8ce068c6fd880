"""`deltakit inspect`: what a delta holds and what it costs."""

from __future__ import annotations

import click

from deltakit.cli.options import SOURCE, Source, json_option, print_json


@click.command()
@click.argument("delta", type=SOURCE)
@click.option("--tensors", is_flag=True, help="List every tensor instead of blocks and kinds.")
@json_option
def command(delta: Source, tensors: bool, as_json: bool) -> None:
    """Show what a delta holds and what it costs.

    Budget and density, where the entries are, how large the changes are, and the size of the file
    against raw coordinates and against the entropy of the support. Of a delta on the Hub only the
    header is downloaded, so that the sizes of the changes are left out.

    \b
    Examples:
      deltakit inspect delta.sdelta
      deltakit inspect delta.sdelta --tensors
      deltakit inspect hf://owner/delta
      deltakit inspect delta.sdelta --json | jq .entries
    """
    from deltakit.cli.inspect_report import report
    from deltakit.inspection import inspect

    found = inspect(delta)
    if as_json:
        print_json(found.as_dict())
    else:
        click.echo("\n\n".join(report(found, tensors)))
