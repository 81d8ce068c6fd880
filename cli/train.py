"""`deltakit train`: fine-tune an exactly budgeted set of weights."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import click

from deltakit.cli.command import Command, Option
from deltakit.cli.options import force_option, is_quiet, json_option, note, print_json, table
from deltakit.cli.settings_options import given, setting_options
from deltakit.cli.values import CONFIG, Listed, Name
from deltakit.parallel.processes import is_first
from deltakit.registry import declared
from deltakit.training.config import describe
from deltakit.training.config_file import read_file, resolve
from deltakit.training.presets import PRESETS

_compare_option = partial(click.option, cls=Option, section="Comparison of methods")


def _comparable() -> Iterable[str]:
    return [
        *declared("deltakit.selection", "METHODS"),
        *declared("deltakit.training", "PEERS"),
        *PRESETS,
    ]


@click.command("train", cls=Command, short_help="Fine-tune an exactly budgeted set of weights.")
@click.argument("config", type=CONFIG, required=False)
@setting_options(describe().items())
@_compare_option(
    "--compare",
    type=Listed(Name(_comparable)),
    help="Train these methods, presets and peers (full, head, lora, shira) at equal budget.",
)
@_compare_option(
    "--compare-lr",
    type=Listed(click.STRING),
    metavar="NAME=X,...",
    help="Learning rates of the methods to compare.",
)
@_compare_option(
    "--seeds",
    type=Listed(click.INT),
    default="0,1,2",
    show_default=True,
    help="Seeds of the methods to compare.",
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted run, to the same bits.")
@force_option
@json_option
def command(
    config: Path | None,
    resume: bool,
    compare: tuple[str, ...] | None,
    compare_lr: tuple[str, ...] | None,
    seeds: tuple[int, ...],
    force: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Fine-tune an exactly budgeted set of a model's weights.

    Settings come from the YAML file CONFIG, from flags, or both; flags win. RUN gets delta.sdelta,
    best.sdelta, budget-N.sdelta for every mark, metrics.json, report.html for a browser, and
    config.yaml, which is a CONFIG.

    With --compare every method and seed is a run of its own, RUN/METHOD/seed-N; what is finished is
    not done again, what was interrupted goes on, and RUN gets compare.json, .csv and .png, and a
    report.html.

    \b
    Examples:
      deltakit train --model MODEL --data train.jsonl --task sequence-classification \\
          --budget 100k --output-dir run
      deltakit train run.yaml --budget 0.1% --checkpoint-budgets 25k,50k --output-dir run
      deltakit train run.yaml --method random --target attention --lr auto
      deltakit train run/config.yaml --resume
      deltakit train run.yaml --compare id3,random,lora --seeds 0,1
      torchrun --nproc-per-node 4 -m deltakit train run.yaml
    """
    file = {} if config is None else read_file(config)
    if compare is not None:
        _compare(file, given(flags), compare, _rates(compare_lr or ()), seeds, force, as_json)
        return
    settings = resolve(file, given(flags))
    from deltakit.training.report import budget_rows, remarks
    from deltakit.training.run import train

    speaks = is_first()  # of the processes that torchrun or accelerate started
    say = note if speaks else lambda text: None
    outcome = train(settings, resume=resume, force=force, say=say, quiet=is_quiet())
    if outcome.record is None:
        saved = shlex.quote(str(Path(settings.output_dir) / "config.yaml"))
        say(f"Interrupted and saved at step {outcome.step}; deltakit train {saved} --resume")
        click.get_current_context().exit(128 + (outcome.signal or 0))
    if not speaks:
        return
    if as_json:
        print_json(outcome.record)
        return
    rows = budget_rows(outcome.record)
    click.echo(table(rows, right=range(len(rows[0]) - 1)))
    for line in remarks(outcome.record):
        click.echo(line)


def _compare(
    file: dict[str, Any],
    flags: dict[str, Any],
    methods: tuple[str, ...],
    rates: dict[str, str],
    seeds: tuple[int, ...],
    force: bool,
    as_json: bool,
) -> None:
    from deltakit.training.comparison import compare_methods, comparison_table

    found = compare_methods(file, flags, methods, seeds=seeds, rates=rates, force=force, say=note)
    if as_json:
        print_json(found)
    else:
        rows = comparison_table(found)
        click.echo(table(rows, right=range(1, len(rows[0]))))
    if any("error" in run for row in found["methods"] for run in row["runs"]):
        click.get_current_context().exit(1)


def _rates(pairs: tuple[str, ...]) -> dict[str, str]:
    rates = {}
    for pair in pairs:
        name, equals, rate = pair.partition("=")
        if not (name and equals and rate):
            raise click.BadParameter(f"expected NAME=RATE, found {pair!r}", param_hint="compare-lr")
        rates[name] = rate
    return rates
