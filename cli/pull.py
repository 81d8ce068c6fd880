"""`deltakit pull`: a delta of the Hub as a file of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deltakit.budget import format_bytes
from deltakit.cli.command import Command
from deltakit.cli.options import (
    force_option,
    json_option,
    output_option,
    print_json,
    printable,
    progress,
)
from deltakit.cli.values import BUDGET, NEW_DELTA

if TYPE_CHECKING:
    from deltakit.publishing.pull import PulledFile


@click.command(cls=Command)
@click.argument("repo", metavar="REPO_ID")
@output_option(
    "A file, or a folder that exists; by default named after REPO_ID, here.", kind=NEW_DELTA
)
@click.option("--revision", metavar="REV", help="A branch, tag or commit; main by default.")
@click.option(
    "-b",
    "--budget",
    type=BUDGET,
    metavar="N",
    help="Of several, the delta that has exactly N entries: 50k, 2.5m, 5000 or 0.1%.",
)
@click.option(
    "--all", "family", is_flag=True, help="All deltas, config.yaml and metrics.json, into a folder."
)
@force_option
@json_option
def command(
    repo: str,
    output: Path | None,
    revision: str | None,
    budget: int | str | None,
    family: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Get a delta from the Hub, whole and checked.

    REPO_ID is owner/name or hf://owner/name[@revision][/file or folder]. Without more, the delta is
    delta.sdelta or the only one there. Every byte is compared with the file's own digests before it
    appears at its place; what is in the cache is not downloaded again.

    \b
    Examples:
      deltakit pull owner/news
      deltakit pull owner/news --budget 50k -o news-50k.sdelta
      deltakit pull owner/news --all --revision v1.0 -o news/
      deltakit pull hf://owner/news@v1.0/best.sdelta
    """
    from deltakit.publishing.pull import pull

    with progress("Checking") as advance:
        report = pull(
            repo,
            output,
            revision=revision,
            budget=budget,
            family=family,
            force=force,
            progress=advance,
        )
    if as_json:
        print_json(report.as_dict())
        return
    for file in report.files:
        click.echo(_line(file, f"hf://{report.repo}@{report.commit[:12]}"))
    if report.base_id is not None:
        at = "" if report.base_revision is None else f" at {report.base_revision[:12]}"
        click.echo(printable(f"made for {report.base_id}{at}; deltakit merge finds it by that"))


def _line(file: PulledFile, source: str) -> str:
    entries = "" if file.entries is None else f"{file.entries:,} entries, "
    return printable(f"{file.path}: {entries}{format_bytes(file.bytes)}, {source}/{file.name}")
