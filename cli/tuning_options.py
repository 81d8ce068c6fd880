"""The options of `deltakit stack --tune-weights`, listed by themselves in its help."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from deltakit.cli.command import Option
from deltakit.cli.evaluation_options import SETTINGS, evaluation_options, split_option
from deltakit.cli.options import F
from deltakit.cli.settings_options import given
from deltakit.cli.values import PATH

_NEEDED = ("model", "data", "task")
_SEARCH = ("evaluations", "objective", "bounds", "regularization", "split", "plot")
_SECTION = "Options of --tune-weights"
_option = partial(click.option, cls=Option, section=_SECTION)


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
            _option(
                "--evaluations",
                type=click.IntRange(1),
                help="Choices of weights to measure, exactly; 40 by default.",
            ),
            _option(
                "--objective",
                metavar="METRIC",
                help="Metric to improve; the task's loss by default.",
            ),
            _option(
                "--bounds", type=float, nargs=2, metavar="LOW HIGH", help="Of weights; -1.5 1.5."
            ),
            _option(
                "--regularization",
                type=click.FloatRange(0),
                metavar="X",
                help="Penalty on the mean absolute weight; 0.05 by default.",
            ),
            _option("--plot", type=PATH, metavar="PNG|SVG", help="Draw the search."),
            evaluation_options(_SECTION),
            split_option(_SECTION),
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
