"""The options by which commands take a model and the data to measure it on."""

from __future__ import annotations

from collections.abc import Callable

import click

from deltakit.cli.command import OPTIONS, Option
from deltakit.cli.options import F
from deltakit.cli.settings_options import setting_options
from deltakit.training.config import describe

SETTINGS = (
    "model",
    "revision",
    "dtype",
    "quantize",
    "double_quantization",
    "compute_dtype",
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
)


def evaluation_options(section: str | None = None) -> Callable[[F], F]:
    """The settings above; section: of the help, by default that of each setting."""
    return setting_options(((n, s) for n, s in describe().items() if n in SETTINGS), section)


def split_option(section: str = OPTIONS) -> Callable[[F], F]:
    """--split, in a section of the help."""
    return click.option(
        "--split",
        metavar="NAME",
        cls=Option,
        section=section,
        help="Split to evaluate on; validation by default. A validation split that the data lacks "
        "is held out as in training.",
    )
