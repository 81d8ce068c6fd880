"""What a task is: it reads rows, fits them to a model's head, encodes them and scores logits.

The order matters: everything about the data is said before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from deltakit.dtypes import Array
from deltakit.training.data import Table

Example = dict[str, Any]  # input_ids, attention_mask, ... as lists of int; labels
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
    problem_type: str | None = None
    num_labels: int | None = None
    max_length: int = 512

    @classmethod
    def of(cls, config: Any) -> TaskSettings:
        """The task's settings out of a larger configuration."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class Head:
    """A classification head that the model already has: its labels by name, and its problem."""

    names: Sequence[str]
    problem_type: str | None


class Problem(Protocol):
    """A task with its data: what training and evaluation need to know."""

    @property
    def metric_names(self) -> Sequence[str]:
        """Names of the metrics; the first is the one that names the best delta."""

    @property
    def model_class(self) -> str:
        """Name of the Auto class of transformers that loads the model."""

    @property
    def config_changes(self) -> Mapping[str, Any]:
        """Changes to the base's config.json that the task's head needs."""

    @property
    def notes(self) -> Sequence[str]:
        """What was decided for the user, one line each."""

    def encode(self, tokenizer: Any, longest: int) -> dict[str, list[Example]]:
        """Every split's rows as token ids, at most `longest` per example."""

    def reduce(self, logits: Any, labels: Any) -> Any:
        """One batch of logits and labels -> a tensor [batch, ...] that `metrics` works on."""

    def metrics(self, reduced: Array, labels: Array) -> dict[str, float]:
        """The metrics over all examples."""

    def tell(self, reduced: Array, label: Any) -> dict[str, Any]:
        """What the model said about one example, as plain JSON. label: None for sequences."""


class Task(Protocol):
    """Reads tables into a problem; raises DataError or ConfigError in one line."""

    def __call__(
        self, tables: Mapping[str, Table], settings: TaskSettings, head: Head | None
    ) -> Problem:
        """The problem that the tables pose to a model with that head (None: a new one)."""
