"""Token classification: words met with their first token, tags by name, scores by hand."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_models import SPECIAL, WORDS, encoder_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from deltakit.errors import DeltakitError
from deltakit.training.data import read_splits, table_of
from deltakit.training.predict import _joined
from deltakit.training.task import IGNORED, Head, TaskSettings
from deltakit.training.tasks import TASKS

Rows = list[dict[str, Any]]


def _tagging(rows: Rows, head: Head | None = None, **settings: Any) -> Any:
    table = table_of(rows, "rows")
    return TASKS["token-classification"]({"train": table}, TaskSettings(**settings), head)


def _pieces() -> PreTrainedTokenizerFast:
    """A tokenizer that cuts plurals in two."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS, "##s"])}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = encoder_tokenizer().backend_tokenizer.post_processor
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")


def test_first_token_of_a_word_has_its_tag() -> None:
    """The rest, and the tokens of the frame, do not count."""
    rows = [{"tokens": ["cats", "runs", "dogs"], "tags": ["B-X", "O", "B-Y"]}]
    tokenizer = _pieces()
    [example] = _tagging(rows).encode(tokenizer, 32)["train"]
    words = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert words == ["[CLS]", "cat", "##s", "runs", "dog", "##s", "[SEP]"]
    assert example["labels"] == [IGNORED, 0, IGNORED, 2, 1, IGNORED, IGNORED]
    [short] = _tagging(rows).encode(tokenizer, 5)["train"]
    assert short["labels"] == [IGNORED, 0, IGNORED, 2, IGNORED]


def test_equal_words_side_by_side_both_count() -> None:
    """A word is told by its place, not by its text."""
    rows = [{"words": ["cat", "cat"], "ner_tags": ["A", "B"]}]
    [example] = _tagging(rows).encode(encoder_tokenizer(), 32)["train"]
    assert example["labels"] == [IGNORED, 0, 1, IGNORED]


def test_numbers_take_the_names_of_the_source(tmp_path: Any) -> None:
    """A column of lists of classes, as `datasets` keeps NER data."""
    kind = datasets.ClassLabel(names=["O", "B-X", "I-X"])
    features = datasets.Features(
        tokens=datasets.Sequence(datasets.Value("string")), ner_tags=datasets.Sequence(kind)
    )
    rows = {"tokens": [["a", "cat"]], "ner_tags": [[0, 1]]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    tables = read_splits(str(tmp_path / "saved"))
    problem = TASKS["token-classification"](tables, TaskSettings(), None)
    assert problem.config_changes["id2label"] == {"0": "O", "1": "B-X", "2": "I-X"}


def test_head_of_the_model_numbers_the_tags() -> None:
    """As for sequence classification."""
    rows = [{"tokens": ["a", "cat"], "tags": ["O", "X"]}]
    problem = _tagging(rows, Head(["X", "O"], None))
    assert problem.tags == {"train": [[1, 0]]}


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, {}, "row 2: expected a list of 1 tags .* found 2"),
        ({"tokens": ["a"], "tags": None}, {}, "row 2: expected a list of 1 tags .* found None"),
        ({"tokens": "a cat", "tags": ["O"]}, {}, "row 2: expected a list of words .* 'a cat'"),
        ({"tokens": ["a"], "tags": [None]}, {}, "row 2: expected a label in column 'tags'"),
        ({"tokens": ["a"], "tags": ["Z"]}, {"num_labels": 2}, "3 different labels, the model 2"),
        ({"tokens": ["a"], "tags": ["O"]}, {"problem_type": "regression"}, "does not apply"),
    ],
)
def test_mistakes_in_tags(row: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    """One line that names the row."""
    rows = [{"tokens": ["a", "b"], "tags": ["O", "X"]}, row]
    with pytest.raises(DeltakitError, match=message) as caught:
        _tagging(rows, **settings)
    assert "\n" not in str(caught.value)


def test_scores_of_batches_of_different_length() -> None:
    """F1 over entities, accuracy and loss over words, whatever the padding."""
    problem = _tagging([{"tokens": ["a"] * 3, "tags": ["O", "B-X", "I-X"]}])
    assert list(problem.names) == ["B-X", "I-X", "O"]
    parts, losses = [], []
    for predicted, labels in (
        ([[2, 0, 1], [2, 2, 2]], [[IGNORED, 0, 1], [IGNORED, 0, IGNORED]]),
        ([[0], [2]], [[0], [2]]),
    ):
        logits = torch.zeros(2, len(predicted[0]), 3)
        for row, tags in enumerate(predicted):
            for at, tag in enumerate(tags):
                logits[row, at, tag] = 1.0
        scores = logits.double().log_softmax(-1)
        kept = [(r, t) for r in range(2) for t in range(len(labels[r])) if labels[r][t] >= 0]
        losses += [-float(scores[r, t, labels[r][t]]) for r, t in kept]
        parts.append(problem.reduce(logits, torch.tensor(labels)).numpy())
    found = problem.metrics(_joined(parts), np.array([]))
    assert found == pytest.approx(
        {
            "f1": 2 * 2 / (2 + 3),
            "precision": 1.0,
            "recall": 2 / 3,
            "token_accuracy": 4 / 5,
            "loss": sum(losses) / 5,
        }
    )
    assert problem.tell(_joined(parts)[0], None) == {
        "prediction": ["B-X", "I-X"],
        "label": ["B-X", "I-X"],
    }


def test_tags_without_an_outside_are_told() -> None:
    """Numbers without names, or parts of speech."""
    assert "none is O" in _tagging([{"tokens": ["a", "b"], "tags": [0, 1]}]).notes[0]
