"""The table of tasks. A new one is a file with a `Task` function and a line here."""

from __future__ import annotations

from deltakit.registry import Registry
from deltakit.training.causal_lm import causal_lm
from deltakit.training.classification import sequence_classification
from deltakit.training.task import Task

TASKS: Registry[Task] = Registry("task")
TASKS.register("sequence-classification", "classes or a number for a text or a pair of texts")(
    sequence_classification
)
TASKS.register("causal-lm", "completions of prompts, chat answers, or plain text")(causal_lm)
