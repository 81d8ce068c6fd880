"""`deltakit convert`: from and to the formats of others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deltakit.cli.command import Command
from deltakit.cli.options import (
    Source,
    force_option,
    json_option,
    note,
    print_json,
    printable,
    progress,
    table,
)
from deltakit.cli.values import BASE, BUDGET, PATH, SOURCE, Choice, Name
from deltakit.registry import declared

if TYPE_CHECKING:
    from deltakit.conversion import ConversionReport
    from deltakit.formats.bridges.bridge import Form


_FORMAT = Name(lambda: declared("deltakit.formats.bridges", "BRIDGES"))


def _list_formats(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from deltakit.formats.bridges import BRIDGES, Bridge

    rows = [["format", "reads", "writes", "", "source"]]
    for record in BRIDGES:
        can = [getattr(record.target, way) is not getattr(Bridge, way) for way in ("read", "write")]
        rows.append(
            [record.name, *("yes" if c else "" for c in can), record.summary, record.source]
        )
    click.echo(table(rows))
    ctx.exit()


@click.command(cls=Command)
@click.argument("source", type=SOURCE, metavar="IN")
@click.argument("out", type=PATH)
@click.option(
    "--from",
    "from_format",
    type=_FORMAT,
    metavar="FORMAT",
    help="What IN is; by default its content.",
)
@click.option(
    "--to", "to_format", type=_FORMAT, metavar="FORMAT", help="What OUT becomes; by default sdelta."
)
@click.option("--base", type=BASE, help="The base checkpoint, which most adapters need.")
@click.option(
    "-b",
    "--budget",
    type=BUDGET,
    metavar="N",
    help="Low-rank changes: entries to keep, 100k or 0.1%.",
)
@click.option("--density", type=float, help="The same as a share of the changed tensors.")
@click.option(
    "--as",
    "form",
    type=Choice(["adapter", "weights"]),
    help="LoRA: keep the adapter (default), or its change of the weights, to a budget.",
)
@click.option(
    "--mode",
    type=Choice(["add", "set"]),
    help="What the values of plain COO are: differences or new weights.",
)
@click.option("--prefix", default="", help="What PEFT's model has before the base's names.")
@click.option("--lossy", is_flag=True, help="Leave out what cannot be converted, and say so.")
@click.option(
    "--tensors", is_flag=True, help="List the energy that is retained of every low-rank change."
)
@click.option(
    "--formats",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_formats,
    help="List the formats and exit.",
)
@force_option
@json_option
def command(
    source: Source,
    out: Path,
    from_format: str | None,
    to_format: str | None,
    base: Source | None,
    budget: int | str | None,
    density: float | None,
    form: Form | None,
    mode: str | None,
    prefix: str,
    lossy: bool,
    tensors: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Convert deltas from and to the formats of others.

    Recognises IN by its content and says what it found; what the conversion loses or assumes is
    told on stderr. Adapters name their base's modules: with --base the names, shapes and dtypes of
    its tensors are used, and its identity goes into the delta.

    \b
    Examples:
      deltakit convert --formats
      deltakit convert shira/ shira.sdelta --base base/
      deltakit convert lora/ lora.sdelta --base base/
      deltakit convert lora/ weights.sdelta --base base/ --as weights --budget 100k
      deltakit convert adapter.sdelta lora/ --to peft-adapter --base base/
      deltakit convert delta.sdelta adapter/ --to peft-supertuning --base base/
    """
    from deltakit.conversion import convert

    with progress("Converting") as advance:
        report = convert(
            source,
            out,
            from_format=from_format,
            to_format=to_format,
            base=base,
            budget=budget,
            density=density,
            form=form,
            mode="set" if mode == "set" else "add" if mode else None,
            prefix=prefix,
            lossy=lossy,
            force=force,
            progress=advance,
        )
    if as_json:
        print_json(report.as_dict())
        return
    note(f"{source}: {printable(report.found)}")
    for told in report.notes:
        note(f"Note: {printable(told)}")
    click.echo(_told(report))
    if tensors and report.energy:
        click.echo(_energies(report))


def _told(report: ConversionReport) -> str:
    told = f"{report.output}: {report.to_format} of {report.entries:,} entries"
    if report.extra_weights:
        told += f", {report.extra_weights:,} weights in extras"
    if report.retained is not None:
        told += f", {report.retained:.2%} of the change's energy"
    return told


def _energies(report: ConversionReport) -> str:
    rows = [["tensor", "retained"]]
    for name, energy in report.energy.items():
        rows.append([name, f"{energy.kept / energy.whole:.2%}" if energy.whole else "-"])
    return table(rows, right=[1])
