"""`deltakit stack`: several deltas become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from deltakit.budget import format_bytes
from deltakit.cli.options import (
    NUMBERS,
    PATH,
    F,
    count,
    force_option,
    json_option,
    mismatch_option,
    note,
    output_option,
    print_json,
    progress,
)
from deltakit.errors import ConfigError, OutputError
from deltakit.formats.atomic import refuse_existing


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
                type=click.Choice(["entries", "numel"]),
                help="What the density is a share of: the delta's entries or all weights.",
            ),
            click.option(
                "--trim-scope",
                type=click.Choice(["global", "tensor"]),
                help="Trim over the whole delta or in each tensor by itself.",
            ),
            click.option(
                "--flavour",
                type=click.Choice(["paper", "mergekit", "peft"]),
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


@click.command()
@click.argument("deltas", type=PATH, nargs=-1, required=True, metavar="DELTA...")
@output_option("Where to write; by default the first DELTA's name with the method, beside it.")
@click.option("--method", default="linear", show_default=True, help="How to combine.")
@click.option(
    "--weights", type=NUMBERS, metavar="W,...", help="One factor per delta, such as 0.5,-1."
)
@click.option(
    "--tensor-weights",
    multiple=True,
    metavar="PATTERN=W,...",
    help="Factors for the tensors that a shell pattern matches; repeatable, the first counts.",
)
@method_options
@click.option(
    "--head",
    metavar="FROM",
    help="The delta (path, or position from 0) whose extras win where several deltas differ.",
)
@click.option("--base", type=PATH, help="The base, for deltas that do not carry base values.")
@mismatch_option
@force_option
@json_option
def command(
    deltas: tuple[Path, ...],
    output: Path | None,
    method: str,
    weights: tuple[float, ...] | None,
    tensor_weights: tuple[str, ...],
    head: str | None,
    base: Path | None,
    allow_base_mismatch: bool,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Make one delta of several.

    All deltas must belong to one base, which is told from what they record. Linear stacking is the
    weighted sum that merging does, so merging the result equals merging all at once, bit for bit;
    --list-methods shows the others.

    \b
    Examples:
      deltakit stack a.sdelta b.sdelta --method ties --density 0.2
      deltakit stack a.sdelta b.sdelta --weights 1,-0.5 -o less.sdelta
      deltakit stack a.sdelta b.sdelta --method della --set epsilon=0.1 --flavour mergekit
    """
    from deltakit.formats.sdelta import save
    from deltakit.stacking import stack

    target = output or deltas[0].with_name(f"{deltas[0].stem}-{method}.sdelta")
    _check_output(target, deltas, force)
    with progress("Stacking") as advance:
        made = stack(
            deltas,
            method,
            weights_by_tensor(weights, tensor_weights, len(deltas)),
            head=head,
            base=base,
            allow_base_mismatch=allow_base_mismatch,
            progress=advance,
            **stacking_options(given),
        )
    save(made, target)
    size = target.stat().st_size
    for told in made.provenance.get("notes", ()):
        note(f"Note: {told}")
    if as_json:
        told = {"output": target, "entries": made.nnz, "tensors": len(made.tensors)}
        print_json(told | {"extras": list(made.extras), "bytes": size, **made.provenance})
        return
    click.echo(
        f"{target}: {made.nnz:,} entries in {count('tensor', made.tensors)} of "
        f"{count('delta', deltas)} by {method}, {format_bytes(size)}"
    )


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


def _check_output(output: Path, deltas: Sequence[Path], force: bool) -> None:
    for delta in deltas:
        if output.exists() and delta.exists() and output.samefile(delta):
            raise OutputError(f"{output} is a delta to be stacked; give another output")
    refuse_existing(output, force)
