"""The table of tasks. A new one is a file with a `Task` function and a line here."""

from __future__ import annotations

from deltakit.registry import Registry
from deltakit.training.causal_lm import causal_lm
from deltakit.training.classification import sequence_classification
from deltakit.training.image_classification import image_classification
from deltakit.training.seq2seq_lm import seq2seq_lm
from deltakit.training.task import Task
from deltakit.training.token_classification import token_classification

TASKS: Registry[Task] = Registry("task")
TASKS.register("sequence-classification", "classes or a number for a text or a pair of texts")(
    sequence_classification
)
TASKS.register("token-classification", "a tag for every word")(token_classification)
TASKS.register("causal-lm", "completions of prompts, options, chat answers, or plain text")(
    causal_lm
)
TASKS.register("seq2seq-lm", "target texts or options for source texts")(seq2seq_lm)
TASKS.register("image-classification", "classes or a number for an image")(image_classification)
