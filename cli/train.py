"""`deltakit train`: fine-tune an exactly budgeted set of weights."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from deltakit.cli.options import PATH, force_option, is_quiet, json_option, note, print_json, table
from deltakit.cli.settings_options import given, setting_options
from deltakit.training.config import describe
from deltakit.training.config_file import read_file, resolve


@click.command("train", short_help="Fine-tune an exactly budgeted set of weights.")
@click.argument("config", type=PATH, required=False)
@setting_options(describe().items())
@click.option("--resume", is_flag=True, help="Go on with an interrupted run, to the same bits.")
@force_option
@json_option
def command(config: Path | None, resume: bool, force: bool, as_json: bool, **flags: Any) -> None:
    """Fine-tune an exactly budgeted set of a model's weights.

    Settings come from the YAML file CONFIG, from flags, or both; flags win. RUN gets delta.sdelta,
    best.sdelta, budget-N.sdelta for every mark, metrics.json, and config.yaml, which is a CONFIG.
    """
    settings = resolve({} if config is None else read_file(config), given(flags))
    from deltakit.training.report import budget_rows, remarks
    from deltakit.training.run import train

    outcome = train(settings, resume=resume, force=force, say=note, quiet=is_quiet())
    if outcome.record is None:
        saved = shlex.quote(str(Path(settings.output_dir) / "config.yaml"))
        note(f"Interrupted and saved at step {outcome.step}; deltakit train {saved} --resume")
        click.get_current_context().exit(128 + (outcome.signal or 0))
    if as_json:
        print_json(outcome.record)
        return
    rows = budget_rows(outcome.record)
    click.echo(table(rows, right=range(len(rows[0]) - 1)))
    for line in remarks(outcome.record):
        click.echo(line)
