"""`deltakit evaluate`: the metrics of a base with deltas applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deltakit.cli.command import Command
from deltakit.cli.evaluation_options import evaluation_options, split_option
from deltakit.cli.options import (
    Source,
    force_option,
    json_option,
    mismatch_option,
    note,
    print_json,
    progress,
    table,
)
from deltakit.cli.settings_options import given
from deltakit.cli.values import DELTA, PATH
from deltakit.formats.atomic import refuse_existing


@click.command("evaluate", cls=Command, short_help="Measure a base with deltas applied.")
@evaluation_options()
@click.option(
    "--delta", "deltas", type=DELTA, multiple=True, help="Delta to apply. May be repeated."
)
@split_option()
@click.option(
    "--predictions",
    type=PATH,
    metavar="FILE",
    help="Write one JSON line per example, with the sha256 of its logits' bits.",
)
@mismatch_option
@force_option
@json_option
def command(
    deltas: tuple[Source, ...],
    split: str | None,
    predictions: Path | None,
    allow_base_mismatch: bool,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure a base model with deltas applied to it in order, or a merged model.

    Deltas are applied to the loaded model by the arithmetic of merging, so a merged model gives
    the same logits to the bit at the same batch size.

    \b
    Examples:
      deltakit evaluate --model base/ --delta delta.sdelta --data test.jsonl \\
          --task sequence-classification
      deltakit evaluate --model merged/ --data test.jsonl --task causal-lm --split test --json
      deltakit evaluate --model base/ --delta hf://owner/delta --data test.jsonl \\
          --task sequence-classification --predictions predictions.jsonl
    """
    if predictions is not None:
        refuse_existing(predictions, force)
    from deltakit.training.evaluate import EvaluateConfig, evaluate

    with progress("Evaluating") as advance:
        result = evaluate(
            EvaluateConfig(**given(settings)),
            deltas,
            split=split,
            predictions=predictions,
            allow_base_mismatch=allow_base_mismatch,
            say=note,
            progress=advance,
        )
    if as_json:
        print_json(result)
        return
    metrics = [[name, f"{value:.4f}"] for name, value in result["metrics"].items()]
    click.echo(table([["metric", "value"], *metrics], right=[1]))
    if "logits_sha256" in result:
        click.echo(f"logits sha256 {result['logits_sha256']}")
