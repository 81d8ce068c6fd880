"""`deltakit lr-find`: a short measured sweep for the learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deltakit.cli.command import Command
from deltakit.cli.options import force_option, json_option, note, print_json, table
from deltakit.cli.settings_options import given, setting_options
from deltakit.cli.values import CONFIG
from deltakit.training.config import describe
from deltakit.training.config_file import read_file, resolve


@click.command("lr-find", cls=Command, short_help="Find the learning rate by a short sweep.")
@click.argument("config", type=CONFIG, required=False)
@setting_options(describe().items())
@force_option
@json_option
def command(config: Path | None, force: bool, as_json: bool, **flags: Any) -> None:
    """Find the learning rate by a short sweep.

    Takes what `deltakit train` takes. Trains briefly at several rates, each from the same start,
    and writes RUN/lr.json and RUN/lr.png; `deltakit train --lr auto` does the same and goes on.

    \b
    Examples:
      deltakit lr-find run.yaml
      deltakit lr-find run.yaml --method random --budget 0.1% --output-dir rates
    """
    settings = resolve({} if config is None else read_file(config), given(flags))
    from deltakit.training.lr_run import find_for

    found = find_for(settings, force=force, say=note)
    if as_json:
        print_json(found.as_dict())
        return
    click.echo(table(found.search.rows(), right=range(3)))
    bound = "none" if found.bound is None else f"{found.bound:.2e}"
    click.echo(
        f"gradient descent on this support is stable up to 2 / lambda_max = {bound} "
        f"(lambda_max {found.lambda_max:.3g}); Adam's rates are of another scale"
    )
    click.echo(f"rate {found.search.reason}")
