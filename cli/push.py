"""`deltakit push`: deltas, a run or a model as one commit on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deltakit.budget import format_bytes
from deltakit.cli.command import Command
from deltakit.cli.options import Source, count, json_option, note, print_json, table
from deltakit.cli.values import DELTA
from deltakit.hub.location import is_location

if TYPE_CHECKING:
    from deltakit.publishing.push_report import PushReport


@click.command(cls=Command)
@click.argument("paths", type=DELTA, nargs=-1, required=True, metavar="PATH... REPO")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", metavar="BRANCH", help="The branch to publish to; main by default.")
@click.option("--message", metavar="TEXT", help="The message of the commit.")
@click.option("--tag", metavar="NAME", help="Name the commit, such as v1.0.")
@click.option(
    "--create/--no-create",
    default=True,
    help="Make the repository and the branch where they are missing; on by default.",
)
@click.option("--dry-run", is_flag=True, help="Tell what would be published; change nothing.")
@click.option(
    "--force",
    is_flag=True,
    help="Replace even what somebody else publishes under the same names at this moment.",
)
@json_option
def command(
    paths: tuple[Source, ...],
    private: bool,
    revision: str | None,
    message: str | None,
    tag: str | None,
    create: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Publish deltas, a run or a model on the Hub.

    PATH is the folder of a run (its deltas, config.yaml and metrics.json; local paths in them are
    cut to names), one or more .sdelta files, or the folder of a model (safetensors, configuration,
    tokenizer). REPO is owner/name or hf://owner/name[@branch]. All of it becomes one commit, with a
    card for deltas that keeps what you wrote into the one that is there; what the Hub has already
    is not sent again. Needs a token that may write: hf auth login, or HF_TOKEN.

    \b
    Examples:
      deltakit push run/ owner/news
      deltakit push news.sdelta owner/news --private --tag v1.0
      deltakit push run/ owner/news --dry-run
      deltakit push merged/ owner/news-merged
    """
    *sources, repo = paths
    if not sources:
        raise click.UsageError("give what to publish and, last, the repository: PATH... REPO")
    if not is_location(repo) and Path(repo).exists():
        raise click.UsageError(
            f"the last argument is the repository, and {repo} is a path here; for a repository of "
            f"that name write hf://{repo}"
        )
    from deltakit.publishing.push import push

    report = push(
        sources,
        str(repo),
        private=private,
        revision=revision,
        message=message,
        create=create,
        tag=tag,
        dry_run=dry_run,
        force=force,
    )
    for told in report.notes:
        note(f"Note: {told}")
    if as_json:
        print_json(report.as_dict())
    else:
        _print(report)


def _print(report: PushReport) -> None:
    rows = [[file.name, format_bytes(file.bytes), file.status] for file in report.files]
    click.echo(table(rows, right=[1]))
    place = f"{report.repo}@{report.commit[:12]}" if report.commit else report.repo
    sent = [file for file in report.files if file.status != "unchanged"]
    size = f"{count('file', sent)}, {format_bytes(sum(file.bytes for file in sent))}"
    private = "private " if report.private else ""
    if not report.changed:
        click.echo(f"{place}: unchanged, so no commit was made")
    elif report.dry_run:
        where = f"a new {private}repository " if report.created else ""
        click.echo(f"{size} would be published to {where}{report.url} ({report.revision})")
    else:
        click.echo(f"{place}: {size} published to {private}{report.url}")
    if report.tag is not None and not report.dry_run:
        click.echo(f"tagged {report.tag}")
