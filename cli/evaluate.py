"""`deltakit evaluate`: the metrics of a base with deltas applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deltakit.cli.options import (
    PATH,
    force_option,
    json_option,
    mismatch_option,
    note,
    print_json,
    table,
)
from deltakit.cli.settings_options import given, setting_options
from deltakit.formats.atomic import refuse_existing
from deltakit.training.config import describe

_SETTINGS = [
    "model",
    "revision",
    "dtype",
    "data",
    "data_name",
    "task",
    "validation_fraction",
    "text_column",
    "text_pair_column",
    "label_column",
    "prompt_column",
    "completion_column",
    "messages_column",
    "source_column",
    "target_column",
    "choices_column",
    "image_column",
    "problem_type",
    "max_length",
    "generate_metrics",
    "max_new_tokens",
    "mixed_precision",
    "eval_batch_size",
    "threads",
]


@click.command("evaluate", short_help="Measure a base with deltas applied.")
@setting_options((name, setting) for name, setting in describe().items() if name in _SETTINGS)
@click.option(
    "--delta", "deltas", type=PATH, multiple=True, help="Delta to apply. May be repeated."
)
@click.option(
    "--split",
    metavar="NAME",
    help="Split to evaluate on; validation by default. A validation split that the data lacks is "
    "held out as in training.",
)
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
    deltas: tuple[Path, ...],
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
    """
    if predictions is not None:
        refuse_existing(predictions, force)
    from deltakit.training.evaluate import EvaluateConfig, evaluate

    result = evaluate(
        EvaluateConfig(**given(settings)),
        deltas,
        split=split,
        predictions=predictions,
        allow_base_mismatch=allow_base_mismatch,
        say=note,
    )
    if as_json:
        print_json(result)
        return
    metrics = [[name, f"{value:.4f}"] for name, value in result["metrics"].items()]
    click.echo(table([["metric", "value"], *metrics], right=[1]))
    if "logits_sha256" in result:
        click.echo(f"logits sha256 {result['logits_sha256']}")
