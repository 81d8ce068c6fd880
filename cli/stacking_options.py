"""The options by which a stacking method is chosen, and weights given by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import click

from deltakit.cli.options import F
from deltakit.cli.values import NUMBERS, Choice, Name
from deltakit.errors import ConfigError
from deltakit.registry import declared

STACKING_METHOD = Name(lambda: declared("deltakit.combine", "METHODS"))


def _list_methods(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from deltakit.combine import METHODS

    for record in METHODS:
        source = f" ({record.source})" if record.source else ""
        options = ", ".join(f"{f.name}={f.default}" for f in fields(record.target))
        click.echo(f"{record.name}: {record.summary}{source}")
        click.echo(f"    flavours: {', '.join(['paper', *record.target.flavours])}")
        click.echo(f"    options: {options}")
    ctx.exit()


def method_options(function: F) -> F:
    """The options by which a stacking method is chosen and set."""
    for option in reversed(
        [
            click.option(
                "--density", type=float, metavar="D", help="Share that trimming methods keep."
            ),
            click.option(
                "--density-of",
                type=Choice(["entries", "numel"]),
                help="What the density is a share of: the delta's entries or all weights.",
            ),
            click.option(
                "--trim-scope",
                type=Choice(["global", "tensor"]),
                help="Trim over the whole delta or in each tensor by itself.",
            ),
            click.option(
                "--flavour",
                type=Choice(["paper", "mergekit", "peft"]),
                help="Whose defaults the method takes; its paper's unless given.",
            ),
            click.option("--seed", type=int, help="Of methods that draw at random."),
            click.option(
                "--set",
                "settings",
                multiple=True,
                metavar="NAME=VALUE",
                help="Any other option of the method, such as epsilon=0.1; repeatable.",
            ),
            click.option(
                "--list-methods",
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=_list_methods,
                help="Show all methods with their sources and options.",
            ),
        ]
    ):
        function = option(function)
    return function


def stacking_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `method_options` put into a command's arguments, as options of `stack`."""
    options = {k: v for k, v in given.items() if k != "settings" and v is not None}
    for setting in given["settings"]:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting!r} is no NAME=VALUE")
        options[name.strip().replace("-", "_")] = value.strip()
    return options


def weights_by_tensor(
    weights: Sequence[float] | None, patterns: Sequence[str], deltas: int
) -> Sequence[float | dict[str, float]] | None:
    """One weight for each delta; by pattern where --tensor-weights were given."""
    if not patterns:
        return weights
    rest = [1.0] * deltas if weights is None else weights
    if len(rest) != deltas:
        raise ConfigError(f"{len(rest)} weights for {deltas} deltas; give one for each")
    made: list[dict[str, float]] = [{} for _ in range(deltas)]
    for text in patterns:
        pattern, _, numbers = text.rpartition("=")
        factors = NUMBERS.convert(numbers, None, None)
        if not pattern or len(factors) != deltas:
            raise ConfigError(f"--tensor-weights {text!r} is no PATTERN=W,... for {deltas} deltas")
        for mapping, factor in zip(made, factors, strict=True):
            mapping.setdefault(pattern, factor)
    return [{**mapping, "*": weight} for mapping, weight in zip(made, rest, strict=True)]
