"""`deltakit demo`: the whole story on the embedded default."""

from __future__ import annotations

from pathlib import Path

import click

from deltakit.cli.command import Command
from deltakit.cli.options import force_option, json_option, print_json
from deltakit.cli.values import FOLDER


@click.command("demo", cls=Command, short_help="The whole story on an embedded model, in minutes.")
@click.option(
    "-o", "--output", type=FOLDER, default=Path("deltakit-demo"), show_default=True, help="Folder."
)
@click.option("--files-only", is_flag=True, help="Only write the embedded model and data.")
@click.option("--max-steps", type=click.IntRange(min=30), help="Train less.")
@force_option
@json_option
def command(
    output: Path, files_only: bool, max_steps: int | None, force: bool, as_json: bool
) -> None:
    """Train two tasks on a small embedded model, inspect, truncate, merge and evaluate.

    Takes about three minutes on two cores and needs no network. The embedded model and data may
    serve your own first steps:

    \b
    Examples:
      deltakit demo
      deltakit demo --files-only -o demo
      deltakit train --model demo/base --data demo/tasks/family \\
          --task sequence-classification --budget 20k --output-dir run
    """
    from deltakit.demo import demo

    tell = (lambda line: None) if as_json else click.echo
    result = demo(output, tell=tell, force=force, files_only=files_only, max_steps=max_steps)
    if as_json:
        print_json(result)
