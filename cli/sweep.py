"""`deltakit sweep`: train over a grid of eps and exp."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from deltakit.cli.command import Command, Option
from deltakit.cli.options import force_option, json_option, note, print_json, table
from deltakit.cli.settings_options import REQUIRED_SECTION, given, setting_options
from deltakit.cli.values import CONFIG, NUMBERS
from deltakit.training.config import describe
from deltakit.training.config_file import read_file

_grid_option = partial(
    click.option, cls=Option, section=REQUIRED_SECTION, type=NUMBERS, required=True
)


@click.command("sweep", cls=Command, short_help="Train over a grid of eps and exp.")
@click.argument("config", type=CONFIG, required=False)
@_grid_option("--eps", help="Values of eps, with commas between.")
@_grid_option("--exp", help="Values of exp, with commas between.")
@setting_options((n, s) for n, s in describe().items() if n not in ("eps", "exp"))
@force_option
@json_option
def command(
    config: Path | None,
    eps: tuple[float, ...],
    exp: tuple[float, ...],
    force: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train over a grid of eps and exp.

    Every pair is a run of its own below RUN, with the other settings from CONFIG and flags; finished
    runs are not done again. RUN gets sweep.json, sweep.csv, sweep.png and report.html.

    \b
    Examples:
      deltakit sweep run.yaml --eps 1,0.1 --exp 0,-1,2
      deltakit sweep run.yaml --eps 1 --exp 0,1 --max-steps 200 --output-dir sweep
    """
    from deltakit.training.sweeps import sweep_d3, sweep_table

    file = {} if config is None else read_file(config)
    found = sweep_d3(file, given(flags), eps=eps, exp=exp, force=force, say=note)
    if as_json:
        print_json(found)
    else:
        rows = sweep_table(found)
        click.echo(table(rows, right=range(len(rows[0]))))
    if any(point["value"] is None for point in found["points"]):
        click.get_current_context().exit(1)
