"""`deltakit inspect`: what a delta holds and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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
)
from deltakit.cli.values import DELTA, PATH
from deltakit.figures import check_figure

if TYPE_CHECKING:
    from deltakit.inspection import Inspection
    from deltakit.views.delta_view import DeltaView


@click.command(cls=Command)
@click.argument("delta", type=DELTA)
@click.option("--tensors", is_flag=True, help="List every tensor instead of blocks and kinds.")
@click.option("--plot", type=PATH, metavar="PNG|SVG", help="Draw where entries are, and how large.")
@click.option("--html", type=PATH, metavar="HTML", help="Write a page to explore the delta in.")
@force_option
@json_option
def command(
    delta: Source,
    tensors: bool,
    plot: Path | None,
    html: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Show what a delta holds and what it costs.

    Budget and density, where the entries are, how large the changes are, and the size of the file
    against raw coordinates and against the entropy of the support. Of a delta on the Hub only the
    header is downloaded, so that the sizes of the changes are left out.

    \b
    Examples:
      deltakit inspect delta.sdelta
      deltakit inspect delta.sdelta --tensors
      deltakit inspect delta.sdelta --plot delta.svg
      deltakit inspect delta.sdelta --html delta.html
      deltakit inspect hf://owner/delta
      deltakit inspect delta.sdelta --json | jq .entries
    """
    for output in (plot, html):
        if output is not None:
            check_output(output, [delta], force)
    if plot is not None:
        check_figure(plot)
    from deltakit.cli.inspect_report import report
    from deltakit.inspection import inspect

    found = inspect(delta)
    if plot is not None or html is not None:
        from deltakit.views.delta_view import DeltaView

        view = DeltaView.of(found)
        if not found.remote:
            found = replace(found, known=view.changes)
        for output in _drawn(found, view, plot, html):
            note(f"Wrote {output}.")
    if as_json:
        print_json(found.as_dict())
    else:
        click.echo("\n\n".join(report(found, tensors)))


def _drawn(
    found: Inspection, view: DeltaView, plot: Path | None, html: Path | None
) -> Iterator[Path]:
    """Write what is asked for."""
    if plot is not None:
        from deltakit.views.plot import plot_delta

        plot_delta(found, view, plot)
        yield plot
    if html is not None:
        from deltakit.pages.delta_page import delta_page
        from deltakit.pages.page import write_page

        write_page(html, delta_page(found, view))
        yield html
