"""`deltakit compare`: how deltas overlap and disagree, before they are stacked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deltakit.cli.command import Command
from deltakit.cli.options import (
    Source,
    check_output,
    force_option,
    json_option,
    note,
    print_json,
    progress,
    table,
)
from deltakit.cli.values import DELTA, PATH, Choice
from deltakit.figures import check_figure

if TYPE_CHECKING:
    from deltakit.comparing.compare import Comparison, Pair
    from deltakit.comparing.overlap import Overlap

_HEADS = ["shared", "by chance", "Jaccard", "of 1st", "of 2nd", "conflicts", "share", "cosine"]


@click.command(cls=Command)
@click.argument("deltas", type=DELTA, nargs=-1, required=True, metavar="DELTA DELTA...")
@click.option(
    "--by",
    type=Choice(["kind", "block", "tensor"]),
    help="List every pair by kind of tensor, block of layers or tensor; two deltas by kind anyway.",
)
@click.option("--plot", type=PATH, metavar="PNG|SVG", help="Draw overlap and sign conflicts.")
@click.option("--html", type=PATH, metavar="HTML", help="Write a page to explore the pairs in.")
@force_option
@json_option
def command(
    deltas: tuple[Source, ...],
    by: str | None,
    plot: Path | None,
    html: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Tell how deltas overlap and disagree.

    For every pair: entries that both change, how many would be shared by chance, sign conflicts
    (shared entries moved in opposite directions), the cosine of the changes, and whether the deltas
    belong to one base. Entries of adapters meet where both deltas are of the very same adapter; of
    others the cosine of the changes is told that they make to the base's weights. Warns where at least a tenth of the smaller delta's entries conflict.

    \b
    Examples:
      deltakit compare a.sdelta b.sdelta
      deltakit compare a.sdelta b.sdelta c.sdelta --by block --plot overlap.png
      deltakit compare a.sdelta b.sdelta c.sdelta --html overlap.html
      deltakit compare a.sdelta b.sdelta --json | jq .pairs[0].cosine
    """
    if len(deltas) < 2:
        raise click.UsageError("a comparison takes at least two deltas")
    for output in (plot, html):
        if output is not None:
            check_output(output, deltas, force)
    if plot is not None:
        check_figure(plot)
    from deltakit.comparing.compare import compare

    with progress("Comparing") as advance:
        found = compare(deltas, progress=advance)
    if plot is not None:
        from deltakit.comparing.plot import plot_comparison

        plot_comparison(found, plot)
        note(f"Wrote {plot}.")
    if html is not None:
        from deltakit.pages.comparison_page import comparison_page
        from deltakit.pages.page import write_page

        write_page(html, comparison_page(found))
        note(f"Wrote {html}, a page for any browser.")
    if as_json:
        print_json(found.as_dict())
        return
    for told in found.notes:
        note(f"Note: {told}")
    click.echo("\n\n".join(_sections(found, by or ("kind" if len(deltas) == 2 else None))))
    if found.warning is not None:
        note(f"Warning: {found.warning}")


def _sections(found: Comparison, by: str | None) -> list[str]:
    listed = [["", "delta", "entries", "tensors"]]
    for number, delta in enumerate(found.deltas, 1):
        listed.append([str(number), delta.label, f"{delta.entries:,}", str(delta.tensors)])
    pairs = [["pair", *_HEADS, "base"]]
    for pair in found.pairs:
        cells = ["-"] * len(_HEADS) if pair.apart else _cells(pair.total)
        pairs.append([_name(pair), *cells, pair.base.verdict])
    sections = [table(listed, right=(0, 2, 3)), table(pairs, right=range(1, 9))]
    if by is not None:
        sections += [_parts(pair, by) for pair in found.pairs if pair.tensors]
    return sections


def _parts(pair: Pair, by: str) -> str:
    parts = {"kind": pair.kinds, "block": pair.blocks}.get(by, pair.tensors)
    rows = [[f"{_name(pair)} by {by}", "1st", "2nd", *_HEADS]]
    for name, part in parts.items():
        rows.append([name, f"{part.first:,}", f"{part.second:,}", *_cells(part)])
    return table(rows, right=range(1, 11))


def _name(pair: Pair) -> str:
    return f"{pair.first + 1}-{pair.second + 1}"


def _cells(part: Overlap) -> list[str]:
    return [
        f"{part.shared:,}",
        f"{part.expected:,.1f}",
        f"{part.jaccard:.3f}",
        f"{part.first_contained:.3f}",
        f"{part.second_contained:.3f}",
        f"{part.conflicts:,}" if part.signed else "-",
        "-" if part.conflict_share is None else f"{part.conflict_share:.3f}",
        "-" if part.cosine is None else f"{part.cosine:+.3f}",
    ]
