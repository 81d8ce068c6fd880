"""The table of tasks. A new one is a file with a `Task` function and a line here.

A task's module is imported when it is first used, so that its name costs help and shells nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from deltakit.registry import Registry

if TYPE_CHECKING:
    from deltakit.training.data import Table
    from deltakit.training.task import Head, Problem, Task, TaskSettings


@dataclass(frozen=True, slots=True)
class Imported:
    """The task `function` of a module of this package."""

    module: str
    function: str

    def __call__(
        self, tables: Mapping[str, Table], settings: TaskSettings, head: Head | None
    ) -> Problem:
        """The problem that the tables pose; see `Task`."""
        task: Task = getattr(import_module(f"deltakit.training.{self.module}"), self.function)
        return task(tables, settings, head)


TASKS: Registry[Task] = Registry("task")
TASKS.register("sequence-classification", "classes or a number for a text or a pair of texts")(
    Imported("classification", "sequence_classification")
)
TASKS.register("token-classification", "a tag for every word")(
    Imported("token_classification", "token_classification")
)
TASKS.register("causal-lm", "completions of prompts, options, chat answers, or plain text")(
    Imported("causal_lm", "causal_lm")
)
TASKS.register("seq2seq-lm", "target texts or options for source texts")(
    Imported("seq2seq_lm", "seq2seq_lm")
)
TASKS.register("image-classification", "classes or a number for an image")(
    Imported("image_classification", "image_classification")
)
