"""Classification and regression: what their tasks share, and that of one text or two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import ConfigError, DataError
from deltakit.training.columns import choose_columns, texts_of
from deltakit.training.data import Table
from deltakit.training.labels import Labels, class_labels, is_regression, raw_labels, real_labels
from deltakit.training.metrics import (
    CLASSIFICATION,
    REGRESSION,
    classification_metrics,
    regression_metrics,
)
from deltakit.training.task import Example, Head, Live, TaskSettings

LABEL_SETTINGS = ("label_column", "problem_type", "num_labels")
_TEXTS = (("text",), ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis"))


def sequence_classification(
    tables: Mapping[str, Table], settings: TaskSettings, head: Head | None
) -> ClassificationProblem:
    """The problem posed by labelled texts; classes are told from numbers by the labels.

    Raises DataError for unknown columns, missing texts or labels, and labels outside the model's
    range, ConfigError for settings that do not belong to this task.
    """
    settings.refuse_others(
        "sequence-classification", "text_column", "text_pair_column", *LABEL_SETTINGS
    )
    first = next(iter(tables.values()))
    text_columns = _text_columns(first, settings)
    labels, regression, label_note = read_labels(tables, settings, head)
    texts = {
        split: [texts_of(table, column) for column in text_columns]
        for split, table in tables.items()
    }
    notes = (f"text from {', '.join(text_columns)}; {label_note}",)
    return ClassificationProblem(labels=labels, regression=regression, notes=notes, texts=texts)


def _text_columns(table: Table, settings: TaskSettings) -> tuple[str, ...]:
    given = (settings.text_column, settings.text_pair_column)
    if given[1] is not None and given[0] is None:
        raise ConfigError("setting text_pair_column needs text_column")
    return choose_columns(table, given, _TEXTS)


def read_labels(
    tables: Mapping[str, Table], settings: TaskSettings, head: Head | None
) -> tuple[Labels, bool, str]:
    """One label per row: the labels, whether they are numbers instead of classes, and a note."""
    first = next(iter(tables.values()))
    usual = (("label",), ("labels",))
    column = choose_columns(first, (settings.label_column,), usual)[0]
    raw = {split: raw_labels(table, column) for split, table in tables.items()}
    regression = is_regression(raw, settings.problem_type, head)
    if regression:
        labels = real_labels(raw, tables, head)
    else:
        names = first.class_names.get(column)
        labels = class_labels(raw, tables, names, settings.num_labels, head)
    return labels, regression, f"label from {column}; {labels.summary}"


def class_changes(names: Sequence[str]) -> dict[str, Any]:
    """The changes to config.json that a head with these labels needs."""
    return {
        "num_labels": len(names),
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


@dataclass(frozen=True, kw_only=True)
class LabelledProblem:
    """One label per example, a class or a number; see `Problem`."""

    labels: Labels
    regression: bool
    notes: Sequence[str]

    @property
    def metric_names(self) -> Sequence[str]:
        """Accuracy first for classes, Pearson correlation first for numbers."""
        return REGRESSION if self.regression else CLASSIFICATION

    @property
    def config_changes(self) -> Mapping[str, Any]:
        """The number of labels, their names and the problem type."""
        kind = "regression" if self.regression else "single_label_classification"
        return {**class_changes(self.labels.names), "problem_type": kind}

    def reduce(self, logits: Any, labels: Any) -> Any:
        """The logits themselves in float32, [batch, labels]."""
        return logits.float()

    def metrics(self, reduced: Array, labels: Array) -> dict[str, float]:
        """Accuracy, macro F1, Matthews and loss, or Pearson, Spearman and squared error."""
        if self.regression:
            return regression_metrics(reduced.reshape(-1), labels)
        return classification_metrics(reduced, np.asarray(labels, dtype=np.int64))

    def live_metrics(self, split: str, live: Live) -> dict[str, float]:
        """None: the logits say it all."""
        return {}

    def tell(self, reduced: Array, label: Any) -> dict[str, Any]:
        """Prediction and label by name (or as numbers), and the logits."""
        logits = [float(value) for value in reduced]
        if self.regression:
            return {"prediction": logits[0], "label": label}
        names = self.labels.names
        return {"prediction": names[int(reduced.argmax())], "label": names[label], "logits": logits}


@dataclass(frozen=True, kw_only=True)
class ClassificationProblem(LabelledProblem):
    """Labelled texts. texts: split -> one or two lists of texts."""

    texts: Mapping[str, Sequence[list[str]]]

    inputs = "texts"
    model_class = "AutoModelForSequenceClassification"

    def encode(self, processor: Any, longest: int) -> dict[str, list[Example]]:
        """Token ids of every row, cut at `longest`; labels are class numbers or floats."""
        if processor.pad_token_id is None:
            raise DataError(
                "the tokenizer has neither a padding nor an end token; texts of different length "
                "cannot share a batch"
            )
        return {split: self._encode(processor, longest, split) for split in self.texts}

    def _encode(self, tokenizer: Any, longest: int, split: str) -> list[Example]:
        encoded = tokenizer(*self.texts[split], truncation=True, max_length=longest)
        labels = self.labels.values[split]
        columns = dict(encoded)
        return [
            {**{key: column[row] for key, column in columns.items()}, "labels": label}
            for row, label in enumerate(labels)
        ]
