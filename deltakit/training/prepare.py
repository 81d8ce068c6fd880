"""Everything before a model is loaded: data, columns, labels, tokens; all that can be wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltakit.errors import ConfigError, DataError, nearest
from deltakit.training.config import TrainConfig
from deltakit.training.data import read_splits
from deltakit.training.pretrained import (
    Located,
    apply_changes,
    head_of,
    load_config,
    load_processor,
    locate,
    longest_input,
    needs_padding_token,
)
from deltakit.training.splits import make_splits
from deltakit.training.task import IGNORED, Example, Problem, TaskSettings
from deltakit.training.tasks import TASKS

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run's problem and examples. config: the model's, changed as the problem needs.

    processor: the tokenizer or image processor; longest: tokens per example at most. changes:
    those to config as config.json writes them. metric: the one that names the best delta.
    """

    located: Located
    config: Any
    processor: Any
    longest: int
    problem: Problem
    changes: Mapping[str, Any]
    examples: Mapping[str, Sequence[Example]]
    splits: Mapping[str, Any]
    metric: str


def prepare(config: TrainConfig, say: Say) -> Prepared:
    """Read and check everything but the model itself; `say` gets notes of one line.

    Raises DataError, ConfigError or MissingFileError.
    """
    sources = read_splits(config.data, config.data_name)
    splits = make_splits(
        sources,
        config.data,
        train=config.train_split,
        validation=config.validation_split,
        fraction=config.validation_fraction,
    )
    tables = {"train": splits.train}
    if splits.validation is not None:
        tables["validation"] = splits.validation
    elif config.eval_strategy != "no":
        raise DataError(
            f"data {config.data} has no validation data and validation_fraction is 0; give a "
            "validation split, or set eval_strategy to no"
        )
    located = locate(config.model, config.revision)
    model_config = load_config(located)
    task = TASKS[config.task]
    problem = task(tables, TaskSettings.of(config), head_of(model_config, config.task))
    metric = choose_metric(problem, config.metric)
    for note in problem.notes:
        say(note)
    processor = load_processor(located, model_config, problem)
    changes = {
        **problem.config_changes,
        **needs_padding_token(model_config, processor, problem),
    }
    apply_changes(model_config, changes)
    longest = longest_input(processor, model_config, config.max_length)
    examples = problem.encode(processor, longest)
    counts = ", ".join(f"{len(rows):,} {split}" for split, rows in examples.items())
    say(f"{counts} examples ({splits.record['how']}){_share(examples['train'])}")
    return Prepared(
        located=located,
        config=model_config,
        processor=processor,
        longest=longest,
        problem=problem,
        changes=changes,
        examples=examples,
        splits=splits.record,
        metric=metric,
    )


def _share(examples: Sequence[Example]) -> str:
    """How many tokens are learnt from, where labels are tokens: the masks in one line."""
    if not isinstance(examples[0]["labels"], list):
        return ""
    labels = [label for example in examples for label in example["labels"]]
    counted = sum(label != IGNORED for label in labels)
    return f"; {counted:,} of {len(labels):,} training tokens count"


def choose_metric(problem: Problem, asked: str | None) -> str:
    """The metric asked for, or the problem's first; ConfigError for one it does not have."""
    names = list(problem.metric_names)
    if asked is None:
        return names[0]
    if asked not in names:
        raise ConfigError(
            f"setting metric: {asked!r} is no metric of this task; expected one of "
            f"{', '.join(names)}{nearest(asked, names)}"
        )
    return asked
