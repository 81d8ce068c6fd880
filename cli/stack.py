"""`deltakit stack`: several deltas become one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltakit.budget import format_bytes
from deltakit.cli.command import Command
from deltakit.cli.options import (
    Source,
    check_output,
    count,
    force_option,
    json_option,
    mismatch_option,
    note,
    output_option,
    print_json,
    progress,
)
from deltakit.cli.stacking_options import (
    STACKING_METHOD,
    method_options,
    stacking_options,
    weights_by_tensor,
)
from deltakit.cli.tuning_options import take_tuning, tuning_options
from deltakit.cli.values import BASE, DELTA, NEW_DELTA, NUMBERS
from deltakit.figures import check_figure
from deltakit.formats.atomic import refuse_existing
from deltakit.hub.locate import named_after

if TYPE_CHECKING:
    from deltakit.delta import SparseDelta


@click.command(cls=Command)
@click.argument("deltas", type=DELTA, nargs=-1, required=True, metavar="DELTA...")
@output_option(
    "Where to write; by default the first DELTA's name with the method, beside it.", kind=NEW_DELTA
)
@click.option(
    "--method", type=STACKING_METHOD, default="linear", show_default=True, help="How to combine."
)
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
@click.option("--base", type=BASE, help="The base, for deltas that do not carry base values.")
@tuning_options
@mismatch_option
@force_option
@json_option
def command(
    deltas: tuple[Source, ...],
    output: Path | None,
    method: str,
    weights: tuple[float, ...] | None,
    tensor_weights: tuple[str, ...],
    head: str | None,
    base: Source | None,
    tuned: bool,
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
      deltakit stack a.sdelta b.sdelta --tune-weights --model base/ --data validation.jsonl \\
          --task causal-lm
    """
    from deltakit.formats.sdelta import save
    from deltakit.stacking import stack

    others = {"--weights": weights, "--tensor-weights": tensor_weights, "--base": base}
    tuning = take_tuning(given, tuned, others)
    named = named_after(deltas[0], ".sdelta")
    target = output or named.with_name(f"{named.stem}-{method}.sdelta")
    check_output(target, deltas, force)
    options = {"head": head, "allow_base_mismatch": allow_base_mismatch, **stacking_options(given)}
    if tuned:
        made, report = _tuned(deltas, method, {**tuning, **options}, force)
    else:
        factors = weights_by_tensor(weights, tensor_weights, len(deltas))
        with progress("Stacking") as advance:
            made = stack(deltas, method, factors, base=base, progress=advance, **options)
        report = dict(made.provenance)
    with progress("Writing") as advance:
        save(made, target, progress=advance)
    size = target.stat().st_size
    for told in made.provenance.get("notes", ()):
        note(f"Note: {told}")
    if as_json:
        told = {"output": target, "entries": made.nnz, "tensors": len(made.tensors)}
        print_json(told | {"extras": list(made.extras), "bytes": size, **report})
        return
    click.echo(
        f"{target}: {made.nnz:,} entries in {count('tensor', made.tensors)} of "
        f"{count('delta', deltas)} by {method}, {format_bytes(size)}"
    )
    if tuned:
        click.echo(f"weights {report['search']['reason']}")


def _tuned(
    deltas: Sequence[Source], method: str, arguments: dict[str, Any], force: bool
) -> tuple[SparseDelta, dict[str, Any]]:
    """The stack with the weights that a search found, and its provenance with all evaluations."""
    plot = arguments.pop("plot", None)
    if plot is not None:
        refuse_existing(plot, force)
        check_figure(plot)  # a search may take hours, so what it lacks is told before
    from deltakit.training.tuned_stack import tune_weights

    found = tune_weights(deltas, method, say=note, **arguments)
    if plot is not None:
        found.search.plot(plot)
    recorded = found.delta.provenance
    whole = {**recorded["search"], **found.search.as_dict()}
    return found.delta, {**recorded, "search": whole}
