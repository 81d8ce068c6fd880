"""What a task is: it reads rows, fits them to a model's head, encodes them and scores the model.

The order matters: everything about the data is said before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from deltakit.dtypes import Array
from deltakit.errors import ConfigError
from deltakit.training.data import Table

# Sequences (input_ids, attention_mask, ...) as lists of int, images (pixel_values) as float32
# arrays; labels: a number, or a list of int.
Example = dict[str, Any]
IGNORED = -100  # the label of a token that does not count, by torch's cross-entropy convention


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSettings:
    """The settings that tell a task which columns to use and how; see TrainConfig for each."""

    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    messages_column: str | None = None
    source_column: str | None = None
    target_column: str | None = None
    choices_column: str | None = None
    image_column: str | None = None
    problem_type: str | None = None
    num_labels: int | None = None
    max_length: int = 512
    generate_metrics: tuple[str, ...] = ()
    max_new_tokens: int = 64

    @classmethod
    def of(cls, config: Any) -> TaskSettings:
        """The task's settings out of a larger configuration."""
        names = {field.name for field in fields(cls)} & {field.name for field in fields(config)}
        return cls(**{name: getattr(config, name) for name in names})

    def refuse_others(self, task: str, *used: str) -> None:
        """Raise ConfigError for a setting that was given and that the task does not use."""
        for field in fields(self):
            given = getattr(self, field.name) != field.default
            if given and field.name not in (*used, "max_length", "max_new_tokens"):
                raise ConfigError(f"setting {field.name} does not apply to task {task}")


@dataclass(frozen=True, slots=True)
class Head:
    """A classification head that the model already has: its labels by name, and its problem."""

    names: Sequence[str]
    problem_type: str | None


@dataclass(frozen=True, slots=True)
class Live:
    """A model as it stands in an evaluation, with what turns rows into its inputs.

    longest: as for `Problem.encode`. mixed_precision: bfloat16 autocast.
    """

    model: Any
    processor: Any
    longest: int
    batch_size: int
    mixed_precision: bool = False


class Problem(Protocol):
    """A task with its data: what training and evaluation need to know."""

    @property
    def metric_names(self) -> Sequence[str]:
        """Names of the metrics; the first is the one that names the best delta."""

    @property
    def model_class(self) -> str:
        """Name of the Auto class of transformers that loads the model."""

    @property
    def inputs(self) -> str:
        """What the model reads, which decides the processor: "texts", "words" or "images"."""

    @property
    def config_changes(self) -> Mapping[str, Any]:
        """Changes to the base's config.json that the task's head needs."""

    @property
    def notes(self) -> Sequence[str]:
        """What was decided for the user, one line each."""

    def encode(self, processor: Any, longest: int) -> Mapping[str, Sequence[Example]]:
        """Every split's rows as the model's inputs, at most `longest` tokens per example.

        processor: a tokenizer or image processor, see `load_processor`.
        """

    def reduce(self, logits: Any, labels: Any) -> Any:
        """One batch of logits and labels -> a tensor [batch, ...] that `metrics` works on."""

    def metrics(self, reduced: Array, labels: Array) -> dict[str, float]:
        """The metrics over all examples."""

    def live_metrics(self, split: str, live: Live) -> dict[str, float]:
        """Metrics of a split that need more than the logits on its examples, if there are any."""

    def tell(self, reduced: Array, label: Any) -> dict[str, Any]:
        """What the model said about one example, as plain JSON. label: None for sequences."""


class Task(Protocol):
    """Reads tables into a problem; raises DataError or ConfigError in one line."""

    def __call__(
        self, tables: Mapping[str, Table], settings: TaskSettings, head: Head | None
    ) -> Problem:
        """The problem that the tables pose to a model with that head (None: a new one)."""
