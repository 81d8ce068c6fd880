"""The options of `deltakit stack --tune-weights`, listed by themselves in its help."""

from __future__ import annotations

from typing import Any

import click

from deltakit.cli.evaluation_options import SETTINGS, evaluation_options, split_option
from deltakit.cli.options import PATH, F
from deltakit.cli.settings_options import given

_NEEDED = ("model", "data", "task")
_SEARCH = ("evaluations", "objective", "bounds", "regularization", "split", "plot")


class TuningCommand(click.Command):
    """A command whose help keeps the options of --tune-weights apart from its own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Two sections of options."""
        own: list[tuple[str, str]] = []
        tuning: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            told = parameter.get_help_record(ctx)
            if told is not None and isinstance(parameter, click.Option):
                (tuning if parameter.name in (*_SEARCH, *SETTINGS) else own).append(told)
        for title, rows in (("Options", own), ("Options of --tune-weights", tuning)):
            with formatter.section(title):
                formatter.write_dl(rows)


def tuning_options(function: F) -> F:
    """--tune-weights and what goes with it, each None unless given."""
    for option in reversed(
        [
            click.option(
                "--tune-weights",
                "tuned",
                is_flag=True,
                help="Find the weights that do best on validation data; needs --model, --data and "
                "--task. --seed is the search's too.",
            ),
            click.option(
                "--evaluations",
                type=click.IntRange(1),
                help="Choices of weights to measure, exactly; 40 by default.",
            ),
            click.option(
                "--objective",
                metavar="METRIC",
                help="Metric to improve; the task's loss by default.",
            ),
            click.option(
                "--bounds", type=float, nargs=2, metavar="LOW HIGH", help="Of weights; -1.5 1.5."
            ),
            click.option(
                "--regularization",
                type=click.FloatRange(0),
                metavar="X",
                help="Penalty on the mean absolute weight; 0.05 by default.",
            ),
            click.option("--plot", type=PATH, metavar="FILE", help="Draw the search as PNG."),
            evaluation_options,
            split_option,
        ]
    ):
        function = option(function)
    return function


def take_tuning(options: dict[str, Any], wanted: bool, others: dict[str, Any]) -> dict[str, Any]:
    """Take the options above out of a command's; those given, as arguments of `tune_weights`.

    wanted: whether --tune-weights was given. others: options that do not go with it, by flag.
    Options of the one without the other are wrong usage, and so are missing ones.
    """
    search = {name: options.pop(name) for name in _SEARCH}
    settings = given({name: options.pop(name) for name in SETTINGS})
    search = {name: value for name, value in search.items() if value is not None}
    if not wanted:
        for name in (*search, *settings):
            raise click.UsageError(f"{_flag(name)} goes with --tune-weights only")
        return {}
    for flag, value in others.items():
        if value:
            raise click.UsageError(f"{flag} does not go with --tune-weights, which finds weights")
    missing = [_flag(name) for name in _NEEDED if not settings.get(name)]
    if missing:
        raise click.UsageError(
            f"--tune-weights measures a model on data: give {', '.join(missing)}"
        )
    needed = {name: settings.pop(name) for name in _NEEDED}
    return {**search, **needed, "settings": settings}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
