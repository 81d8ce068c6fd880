"""Sequence-to-sequence language modelling: a target text, or options, for a source text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltakit.errors import ConfigError
from deltakit.training.columns import answers_of, choices_of, choose_columns, texts_of
from deltakit.training.data import Table
from deltakit.training.language import TextProblem, TextRows, with_end, without_end
from deltakit.training.task import Example, Head, TaskSettings

_CHOICES = (
    ("source", "choices", "answer"),
    ("question", "choices", "answer"),
    ("prompt", "choices", "answer"),
)
_PAIRS = (
    ("source", "target"),
    ("input", "target"),
    ("input", "output"),
    ("prompt", "completion"),
    ("text", "summary"),
    ("document", "summary"),
    ("article", "highlights"),
    ("question", "answer"),
    ("question", "answers"),
)


def seq2seq_lm(
    tables: Mapping[str, Table], settings: TaskSettings, head: Head | None
) -> Seq2SeqProblem:
    """The problem posed by sources with targets, or with options of which one is right.

    A target may be a list of right ones, of which the first is learnt. Raises DataError for
    unknown columns and rows without text, ConfigError for settings that contradict each other or
    do not belong to this task.
    """
    pair = ("source_column", "target_column")
    choice = ("source_column", "choices_column", "label_column")
    settings.refuse_others("seq2seq-lm", *pair, *choice, "generate_metrics")
    first = next(iter(tables.values()))
    wanted = choice if settings.choices_column or settings.label_column else pair
    if wanted is choice and settings.target_column:
        raise ConfigError("columns are set for options and for a target; set them for one only")
    given = [getattr(settings, name) for name in wanted]
    if any(given) and not all(given):
        missing = wanted[given.index(None)]
        raise ConfigError(f"setting {missing} is missing; it goes with the columns that are set")
    columns = choose_columns(first, given, (*_CHOICES, *_PAIRS))
    rows = {split: _rows(table, columns) for split, table in tables.items()}
    form = "choice" if len(columns) == len(choice) else "target"
    return Seq2SeqProblem(form, rows, settings, (f"{form} from {', '.join(columns)}",))


def _rows(table: Table, columns: tuple[str, ...]) -> TextRows:
    sources = texts_of(table, columns[0])
    if len(columns) == 2:
        return TextRows(sources, answers_of(table, columns[1]))
    return TextRows.of_choices(sources, *choices_of(table, columns[1], columns[2]))


class Seq2SeqProblem(TextProblem):
    """Targets to write for sources; form: "target" or "choice"."""

    model_class = "AutoModelForSeq2SeqLM"

    def encode_rows(self, tokenizer: Any, longest: int, rows: TextRows) -> list[Example]:
        """Sources as inputs, targets with their end token as labels, both cut at `longest`."""
        targets = [
            with_end(tokenizer, tokens[: longest - 1])
            for tokens in _targets(tokenizer, [answers[0] for answers in rows.answers])
        ]
        return _examples(tokenizer, longest, rows.prompts, targets)

    def encode_options(
        self, tokenizer: Any, longest: int, prompts: Sequence[str], options: Sequence[str]
    ) -> list[Example]:
        """Sources as inputs, options as labels."""
        targets = [tokens[:longest] for tokens in _targets(tokenizer, options)]
        return _examples(tokenizer, longest, prompts, targets)

    def encode_prompts(
        self, tokenizer: Any, longest: int, prompts: Sequence[Any]
    ) -> list[list[int]]:
        """The sources, as in training."""
        encoded = tokenizer(list(prompts), truncation=True, max_length=longest)
        return list(encoded["input_ids"])


def _targets(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    encoded = tokenizer(text_target=list(texts))["input_ids"]
    return [without_end(tokenizer, tokens) for tokens in encoded]


def _examples(
    tokenizer: Any, longest: int, sources: Sequence[str], targets: Sequence[list[int]]
) -> list[Example]:
    encoded = tokenizer(list(sources), truncation=True, max_length=longest)
    columns = (encoded["input_ids"], encoded["attention_mask"], targets)
    return [
        {"input_ids": tokens, "attention_mask": mask, "labels": labels}
        for tokens, mask, labels in zip(*columns, strict=True)
    ]
