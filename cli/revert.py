"""`deltakit revert`: a model as it was before it was merged into."""

from __future__ import annotations

from pathlib import Path

import click

from deltakit.cli.command import Command
from deltakit.cli.options import count, json_option, note, print_json, progress
from deltakit.cli.values import LocalPath


@click.command(cls=Command)
@click.argument("model", type=LocalPath(".safetensors"))
@click.option(
    "--undo",
    type=LocalPath(".sdelta"),
    metavar="FILE",
    help="The undo.sdelta of a journal that stands elsewhere.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Restore entries that something else has changed, too, and through links.",
)
@json_option
def command(model: Path, undo: Path | None, force: bool, as_json: bool) -> None:
    """Take merges in place back, bit for bit.

    MODEL is a .safetensors file or a folder that deltakit merge --in-place has changed, once or
    several times; all of it is taken back and the journal beside it is removed. What was
    interrupted is put in order first, a merge by rolling it back.

    \b
    Examples:
      deltakit revert model/
      deltakit revert model.safetensors --undo saved/undo.sdelta
    """
    from deltakit.in_place.revert import revert

    with progress("Reverting") as advance:
        report = revert(model, undo=undo, force=force, progress=advance)
    for told in report.notes:
        note(f"Note: {told}")
    if as_json:
        print_json(report.as_dict())
        return
    click.echo(
        f"{report.model}: {report.entries:,} entries in {count('file', report.files)} have their "
        f"original bits again, {count('delta', report.deltas)} taken back"
    )
