"""`deltakit merge`: a base with deltas in it, as a new file or folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltakit.budget import format_bytes
from deltakit.cli.command import Command
from deltakit.cli.options import (
    Source,
    count,
    force_option,
    json_option,
    mismatch_option,
    note,
    output_option,
    print_json,
    progress,
    shard_option,
    workers_option,
)
from deltakit.cli.stacking_options import STACKING_METHOD, method_options, stacking_options
from deltakit.cli.values import MODEL_OR_DELTA, NUMBERS
from deltakit.errors import ConfigError, MissingFileError

if TYPE_CHECKING:
    from deltakit.in_place.merge import InPlaceReport
    from deltakit.shares import Shard


@click.command(cls=Command)
@click.argument("paths", type=MODEL_OR_DELTA, nargs=-1, required=True, metavar="[BASE] DELTA...")
@output_option("A file or folder to write; by default BASE-DELTA beside DELTA.")
@click.option(
    "--weights", type=NUMBERS, metavar="W,...", help="One factor per delta, such as 0.5,0.5."
)
@click.option(
    "--method",
    type=STACKING_METHOD,
    metavar="METHOD",
    help="Stack the deltas first, as deltakit stack does.",
)
@method_options
@click.option(
    "--dtype",
    metavar="DTYPE",
    help="'trained' reproduces the trained bits; bfloat16 and others convert the merged weights.",
)
@click.option(
    "--head",
    metavar="FROM",
    help="The delta (path, or position from 0) whose extras win where several deltas differ.",
)
@click.option(
    "--in-place", is_flag=True, help="Change BASE itself; deltakit revert BASE takes it back."
)
@click.option(
    "--requantize",
    is_flag=True,
    help="Merge into a base of 4 or 8 bits by quantising again; tells how many entries survive.",
)
@click.option(
    "--keep-base/--no-keep-base",
    default=True,
    help="Let go of each weight file of a BASE on the Hub once it is merged, unless the cache had it "
    "before; kept by default.",
)
@click.option("--dry-run", is_flag=True, help="Check everything and tell sizes; write nothing.")
@workers_option("Weight files written at a time; up to 4 by default.")
@shard_option("Merge share I of N of the weight files, as one job of an array; the last publishes.")
@mismatch_option
@force_option
@json_option
def command(
    paths: tuple[Source, ...],
    output: Path | None,
    weights: tuple[float, ...] | None,
    method: str | None,
    dtype: str | None,
    head: str | None,
    in_place: bool,
    requantize: bool,
    keep_base: bool,
    dry_run: bool,
    workers: int | None,
    shard: Shard | None,
    allow_base_mismatch: bool,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Write a base with deltas merged into it.

    BASE is a .safetensors file or a folder with a checkpoint, single, sharded or as
    torch.distributed.checkpoint saves it; it is not changed unless --in-place is given, which writes
    entries only, whatever the size of BASE, and keeps what was there in a journal beside it (--force:
    also through links). Both may be on the Hub:
    hf://owner/repo[@revision][/file]. Without BASE it is the repository and commit that DELTA
    records, in the cache or downloaded; --no-keep-base lets go of each weight file once it is merged.
    Arguments are told apart by content, so their order matters among deltas only. Every delta is
    checked against BASE before anything appears at its place. Deltas of adapters (LoRA, AdaLoRA, DoRA,
    (IA)3, LoHa, LoKr) are folded into the weights, into a new file only.

    With --shard I/N it is one job of an array, at any time and on any machine that sees the same
    files. Each writes its weight files into one hidden folder beside the output, and the last one to
    finish puts it in its place. A job that is run again does what is missing of its share.

    \b
    Examples:
      deltakit merge base.safetensors delta.sdelta
      deltakit merge model/ a.sdelta b.sdelta --weights 0.5,0.5 -o both/
      deltakit merge model/ a.sdelta b.sdelta --method ties --density 0.2
      deltakit merge model/ delta.sdelta --dry-run
      deltakit merge model/ delta.sdelta --in-place
      deltakit merge hf://owner/delta
      deltakit merge hf://owner/model hf://owner/delta -o merged/
      deltakit merge model/ delta.sdelta -o merged/ --shard 3/8
    """
    from deltakit.in_place.merge import merge_in_place
    from deltakit.merging.merge import merge
    from deltakit.stacking import stack

    if in_place:
        new = {"--output": output, "--dtype": dtype, "--workers": workers, "--shard": shard}
        _refuse_with_in_place({**new, "--requantize": requantize or None})
    base, deltas = split(paths)
    options = stacking_options(given)
    if in_place:
        if base is None:
            raise ConfigError(
                "no base given, and --in-place changes one on this machine; write: deltakit merge "
                "BASE DELTA --in-place"
            )
        made = deltas if method is None else [stack(deltas, method, weights, head=head, **options)]
        with progress("Merging") as advance:
            done = merge_in_place(
                base,
                made,
                weights=weights if method is None else None,
                allow_base_mismatch=allow_base_mismatch,
                force=force,
                dry_run=dry_run,
                head=head if method is None else None,
                progress=advance,
            )
        _print_in_place(done, as_json)
        return
    with progress("Merging") as advance:
        report = merge(
            base,
            deltas,
            output,
            weights=weights,
            method=method,
            dtype=dtype,
            allow_base_mismatch=allow_base_mismatch,
            force=force,
            dry_run=dry_run,
            head=head,
            progress=advance,
            workers=workers,
            shard=shard,
            requantize=requantize,
            keep_base=keep_base,
            **options,
        )
    for told in report.notes:
        note(f"Note: {told}")
    if as_json:
        print_json(report.as_dict())
        return
    if report.share is not None:
        click.echo(f"{report.output}: {report.share}")
        return
    what = "would be written, " if dry_run else ""
    click.echo(
        f"{report.output}: {what}{format_bytes(report.bytes)} in {count('file', report.files)}, "
        f"{report.entries:,} entries of {count('delta', report.deltas)} merged"
    )
    if report.extras:
        click.echo(f"whole tensors written: {', '.join(report.extras)}")
    if dry_run:
        click.echo(f"memory needed: about {format_bytes(report.peak_memory)}")


def _refuse_with_in_place(options: Mapping[str, object]) -> None:
    for option, given in options.items():
        if given is not None:
            raise click.UsageError(f"{option} does not go with --in-place, which writes into BASE")


def _print_in_place(report: InPlaceReport, as_json: bool) -> None:
    for told in report.notes:
        note(f"Note: {told}")
    if as_json:
        print_json(report.as_dict())
        return
    what = "would be merged" if report.dry_run else "merged"
    earlier = f" and {len(report.merged_before)} before" if report.merged_before else ""
    click.echo(
        f"{report.model}: {report.entries:,} entries of {count('delta', report.deltas)}{earlier} "
        f"{what} in place, in {count('file', report.files)}; {format_bytes(report.journal_bytes)} "
        f"in {report.journal}"
    )
    if report.extras:
        click.echo(f"whole tensors written: {', '.join(report.extras)}")


def split(paths: Sequence[Source]) -> tuple[Source | None, list[Source]]:
    """The base, if given, and the deltas among `paths`, told apart by content (on the Hub by file
    names).

    A broken file that calls itself .sdelta counts as a delta, so that reading it tells what is
    wrong. Raises MissingFileError for a path that does not exist and ConfigError for several bases
    and for no delta.
    """
    from deltakit.formats.checkpoint_files import split_part

    for path in paths:
        if isinstance(path, Path) and not split_part(path)[0].exists():
            raise MissingFileError(f"no such file or folder: {path}")
    deltas = [path for path in paths if _is_delta(path)]
    bases = [p for p in paths if p not in deltas]
    if not deltas:
        raise ConfigError(f"no delta given: {', '.join(map(str, bases))} is no .sdelta file")
    if len(bases) > 1:
        raise ConfigError(
            f"a merge takes one base, found {len(bases)}: {', '.join(map(str, bases))}; "
            "the others are no .sdelta files"
        )
    return bases[0] if bases else None, deltas


def _is_delta(path: Source) -> bool:
    from deltakit.formats.sdelta import is_sdelta
    from deltakit.hub.locate import stands_for_delta

    if isinstance(path, str):
        return stands_for_delta(path)
    return path.is_file() and (path.suffix == ".sdelta" or is_sdelta(path))
