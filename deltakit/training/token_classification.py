"""Token classification: one tag per word, as in named-entity recognition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import DataError
from deltakit.training.classification import class_changes
from deltakit.training.columns import choose_columns
from deltakit.training.data import Table
from deltakit.training.entities import entity_metrics
from deltakit.training.labels import class_labels, raw_labels
from deltakit.training.task import IGNORED, Example, Head, Live, TaskSettings

_WORDS = ("tokens", "words")
_TAGS = ("tags", "ner_tags", "labels")


def token_classification(
    tables: Mapping[str, Table], settings: TaskSettings, head: Head | None
) -> TokenProblem:
    """The problem posed by lists of words with lists of tags, as names or numbers.

    Raises DataError for unknown columns, rows whose lists are missing or differ in length, and
    tags outside the model's range, ConfigError for settings that do not belong to this task.
    """
    settings.refuse_others("token-classification", "text_column", "label_column", "num_labels")
    first = next(iter(tables.values()))
    words = choose_columns(first, (settings.text_column,), tuple((name,) for name in _WORDS))[0]
    tags = choose_columns(first, (settings.label_column,), tuple((name,) for name in _TAGS))[0]
    texts = {split: _lists(table, words) for split, table in tables.items()}
    flat = {split: _flat(table, tags, texts[split]) for split, table in tables.items()}
    raw = {split: raw_labels(table, tags) for split, table in flat.items()}
    labels = class_labels(raw, flat, first.class_names.get(tags), settings.num_labels, head)
    numbers = {}
    for split, every in labels.values.items():
        rest = iter(every)
        numbers[split] = [list(islice(rest, len(row))) for row in texts[split]]
    note = f"words from {words}; tags from {tags}; {labels.summary}"
    if "O" not in labels.names:
        note += "; none is O, so every run of one tag counts as an entity"
    return TokenProblem(texts, numbers, labels.names, (note,))


def _lists(table: Table, column: str) -> list[list[Any]]:
    lists = []
    for number, row in table.numbered():
        value = row.get(column)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise DataError(
                f"data {table.origin} row {number}: expected a list of words in column {column!r}, "
                f"found {value!r:.40}"
            )
        lists.append(value)
    return lists


def _flat(table: Table, column: str, texts: list[list[str]]) -> Table:
    """A table with one row per tag, which remembers the number of the tag's row."""
    rows, numbers = [], []
    for (number, row), words in zip(table.numbered(), texts, strict=True):
        tags = row.get(column)
        if not isinstance(tags, list) or len(tags) != len(words):
            found = f"{len(tags)}" if isinstance(tags, list) else f"{tags!r:.40}"
            raise DataError(
                f"data {table.origin} row {number}: expected a list of {len(words)} tags in column "
                f"{column!r}, one per word, found {found}"
            )
        rows += [{column: tag} for tag in tags]
        numbers += [number] * len(tags)
    if not rows:
        raise DataError(f"data {table.origin}: holds no words")
    return Table(rows, [column], table.origin, table.class_names, numbers)


@dataclass(frozen=True)
class TokenProblem:
    """Tagged words. words, tags: split -> a list per row; names: the tags' names, by number."""

    words: Mapping[str, list[list[str]]]
    tags: Mapping[str, list[list[int]]]
    names: Sequence[str]
    notes: Sequence[str]

    inputs = "words"
    model_class = "AutoModelForTokenClassification"
    metric_names = ("f1", "precision", "recall", "token_accuracy", "loss")

    @property
    def config_changes(self) -> Mapping[str, Any]:
        """The number of tags and their names."""
        return class_changes(self.names)

    def encode(self, processor: Any, longest: int) -> dict[str, list[Example]]:
        """Token ids of every row; the first token of a word has its tag, the rest do not count.

        Words beyond `longest` tokens are cut off and count nowhere. DataError for a tokenizer that
        cannot tell which word a token is of.
        """
        if not processor.is_fast:
            raise DataError(
                "the tokenizer cannot tell which word a token belongs to; token-classification "
                "needs one with a tokenizer.json"
            )
        if processor.pad_token_id is None:
            raise DataError("the tokenizer has neither a padding nor an end token")
        return {split: self._encode(processor, longest, split) for split in self.words}

    def _encode(self, tokenizer: Any, longest: int, split: str) -> list[Example]:
        encoded = tokenizer(
            self.words[split], is_split_into_words=True, truncation=True, max_length=longest
        )
        columns = dict(encoded)
        return [
            {
                **{key: column[row] for key, column in columns.items()},
                "labels": _first_tokens(encoded.word_ids(row), tags),
            }
            for row, tags in enumerate(self.tags[split])
        ]

    def reduce(self, logits: Any, labels: Any) -> Any:
        """[batch, tokens, tags], [batch, tokens] -> float64 [batch, tokens, 3].

        Predicted tag, true tag and negative log-likelihood; all -100 where a token does not count.
        """
        counts = labels != IGNORED
        scores = logits.float()
        chosen = scores.gather(-1, labels.where(counts, 0).unsqueeze(-1)).squeeze(-1)
        found = scores.new_full((*labels.shape, 3), IGNORED).double()
        found[..., 0] = scores.argmax(-1).where(counts, IGNORED)
        found[..., 1] = labels
        found[..., 2] = (scores.logsumexp(-1) - chosen).where(counts, IGNORED)
        return found

    def metrics(self, reduced: Array, labels: Array) -> dict[str, float]:
        """Micro F1, precision and recall of entities; accuracy and loss of the tokens that count.

        The loss is the mean negative log-likelihood in nats.
        """
        counts = reduced[..., 1] != IGNORED
        found, true, loss = np.moveaxis(reduced[counts], -1, 0)
        rows = [self._named(row) for row in reduced]
        return {
            **entity_metrics(rows),
            "token_accuracy": float((found == true).mean()),
            "loss": float(loss.mean()),
        }

    def live_metrics(self, split: str, live: Live) -> dict[str, float]:
        """None: the logits say it all."""
        return {}

    def tell(self, reduced: Array, label: Any) -> dict[str, Any]:
        """Predicted and true tags of the words, by name."""
        found, true = self._named(reduced)
        return {"prediction": found, "label": true}

    def _named(self, reduced: Array) -> tuple[list[str], list[str]]:
        kept = reduced[reduced[:, 1] != IGNORED].astype(np.int64)
        found, true = ([self.names[n] for n in kept[:, column]] for column in (0, 1))
        return found, true


def _first_tokens(words: list[int | None], tags: list[int]) -> list[int]:
    """Labels of tokens, given the word of each: its tag for the word's first one."""
    before = [None, *words]
    return [
        IGNORED if word is None or word == last else tags[word]
        for word, last in zip(words, before, strict=False)
    ]
