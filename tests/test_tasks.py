"""Tasks: columns, labels, exact masks of prompts, scores, and every mistake told in one line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import TEMPLATE, decoder_tokenizer, encoder_tokenizer

from deltakit.errors import ConfigError, DataError, DeltakitError
from deltakit.training.collate import Collator
from deltakit.training.data import Table, table_of
from deltakit.training.task import IGNORED, Head, TaskSettings
from deltakit.training.tasks import TASKS

Rows = list[dict[str, Any]]


def _problem(
    task: str, rows: Rows, head: Head | None = None, validation: Rows | None = None, **settings: Any
) -> Any:
    tables: dict[str, Table] = {"train": table_of(rows, "rows")}
    if validation is not None:
        tables["validation"] = table_of(validation, "held")
    return TASKS[task](tables, TaskSettings(**settings), head)


def _classes(rows: Rows, head: Head | None = None, **settings: Any) -> Any:
    return _problem("sequence-classification", rows, head, **settings)


def _labelled(*labels: Any) -> Rows:
    return [{"text": "the cat", "label": label} for label in labels]


def test_text_labels_are_numbered_in_sorted_order() -> None:
    """Over all splits, so that evaluation cannot meet an unknown one."""
    problem = _classes(_labelled("no", "yes", "no"), validation=_labelled("maybe"))
    assert problem.labels.values == {"train": [1, 2, 1], "validation": [0]}
    assert problem.config_changes == {
        "num_labels": 3,
        "id2label": {"0": "maybe", "1": "no", "2": "yes"},
        "label2id": {"maybe": 0, "no": 1, "yes": 2},
        "problem_type": "single_label_classification",
    }


@pytest.mark.parametrize("labels", [[0, 2, 1], ["0", "2", "1"]])
def test_whole_numbers_are_class_numbers(labels: list[Any]) -> None:
    """As text too, which is all that a CSV file has."""
    problem = _classes(_labelled(*labels))
    assert problem.labels.values == {"train": [0, 2, 1]}
    assert list(problem.labels.names) == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_unused_classes_are_told() -> None:
    """Stars from 1 to 3 leave class 0 unused."""
    assert "4 classes (1 of them never used)" in _classes(_labelled(1, 2, 3, 1)).notes[0]


def test_booleans_are_two_classes() -> None:
    """false is 0, true is 1."""
    rows = [{"text": "a", "label": True}, {"text": "b", "label": False}]
    assert _classes(rows).labels.values == {"train": [1, 0]}


def test_one_class_alone_still_makes_two() -> None:
    """A model with one label would be a regression."""
    assert _classes(_labelled(0, 0)).config_changes["num_labels"] == 2
    assert _classes(_labelled("a", "a")).config_changes["num_labels"] == 2


@pytest.mark.parametrize("labels", [[0.5, 1.0], ["0.5", "1.0"], [0.0, 1.0]])
def test_floats_are_a_regression(labels: list[Any]) -> None:
    """Labels written as floats are numbers, not classes."""
    problem = _classes(_labelled(*labels))
    assert problem.labels.values == {"train": [float(label) for label in labels]}
    assert problem.config_changes["problem_type"] == "regression"
    assert problem.config_changes["num_labels"] == 1
    assert problem.metric_names[0] == "pearson"


def test_problem_type_overrules_the_labels() -> None:
    """Whole numbers as a regression, floats as classes."""
    whole = _classes(_labelled(1, 5), problem_type="regression")
    assert whole.labels.values == {"train": [1.0, 5.0]}
    floats = _classes(_labelled(1.0, 0.0), problem_type="classification")
    assert floats.labels.values == {"train": [1, 0]}


def test_head_of_the_model_decides() -> None:
    """Labels are numbered as the model's head names them."""
    head = Head(["yes", "no", "maybe"], "single_label_classification")
    problem = _classes(_labelled("no", "yes"), head)
    assert problem.labels.values == {"train": [1, 0]}
    assert list(problem.labels.names) == ["yes", "no", "maybe"]


def test_class_names_of_the_source() -> None:
    """Names known from the data set go into the config."""
    table = Table(_labelled(1, 0), ["text", "label"], "d", {"label": ["bad", "good"]})
    problem = TASKS["sequence-classification"]({"train": table}, TaskSettings(), None)
    assert problem.config_changes["id2label"] == {"0": "bad", "1": "good"}


HEAD3 = Head(["LABEL_0", "LABEL_1", "LABEL_2"], None)


@pytest.mark.parametrize(
    ("rows", "head", "settings", "message"),
    [
        (_labelled(0, 3), HEAD3, {}, r"rows row 2: label 3 is outside the model's range of 3 lab"),
        (_labelled(0, -1), None, {}, r"row 2: label -1 is outside .* of 2 labels \(0 to 1\)"),
        (_labelled(0, 5), None, {"num_labels": 3}, r"label 5 is outside .* \(0 to 2\)"),
        (_labelled("a", "b", "c", "d"), HEAD3, {}, "4 different labels, the model 3: a, b, c, d"),
        (_labelled("goof"), Head(["good", "bad"], None), {}, r"label 'goof' .* nearest: good"),
        (_labelled("a", "b", "c"), None, {"num_labels": 2}, "3 different labels, the model 2"),
        (_labelled(0, 1), HEAD3, {"num_labels": 2}, "num_labels is 2, but the model's head has 3"),
        (_labelled(0.5), HEAD3, {"problem_type": "regression"}, "3 labels; a regression needs 1"),
        (_labelled("x"), None, {"problem_type": "regression"}, "row 1: label 'x' is no number"),
        (_labelled(0, 99), None, {}, "label 99 needs 100 classes, more than the 2 rows"),
        (_labelled(1, None), None, {}, "row 2: expected a label in column 'label', found None"),
        (_labelled(0.5, float("nan")), None, {}, "row 2: expected a label"),
        (_labelled(0), None, {"text_column": "txt"}, "no column 'txt'; found text, label; nearest"),
        (_labelled(0), None, {"label_column": "y"}, "rows has no column 'y'; found text, label"),
        ([{"body": "a", "label": 0}], None, {}, "expected a column text or sentence or sentence1"),
        ([{"text": "a"}], None, {}, "expected a column label or labels, found text"),
        ([{"text": 3, "label": 0}], None, {}, "row 1: expected text in column 'text', found 3"),
        (_labelled(0), None, {"text_pair_column": "text"}, "text_pair_column needs text_column"),
        (_labelled(0), None, {"prompt_column": "text"}, "prompt_column does not apply to task"),
    ],
)
def test_mistakes_in_labelled_data(
    rows: Rows, head: Head | None, settings: dict[str, Any], message: str
) -> None:
    """One line that says where, what was found and what was expected."""
    with pytest.raises(DeltakitError, match=message) as caught:
        _classes(rows, head, **settings)
    assert isinstance(caught.value, (DataError, ConfigError))
    assert "\n" not in str(caught.value)


def test_rows_are_numbered_as_in_the_file() -> None:
    """After holding out, too."""
    table = table_of(_labelled(0, 1, 0, 7), "file").keep([False, True, False, True])
    with pytest.raises(DataError, match="file row 4: label 7"):
        TASKS["sequence-classification"]({"train": table}, TaskSettings(num_labels=2), None)


def test_pairs_are_encoded_as_pairs() -> None:
    """[CLS] a [SEP] b [SEP], with the second text marked, cut at the longest length."""
    rows = [{"sentence1": "the cat", "sentence2": "a dog runs", "label": 1}]
    tokenizer = encoder_tokenizer()
    [example] = _classes(rows).encode(tokenizer, 32)["train"]
    words = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert words == ["[CLS]", "the", "cat", "[SEP]", "a", "dog", "runs", "[SEP]"]
    assert example["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert example["labels"] == 1
    assert len(_classes(rows).encode(tokenizer, 6)["train"][0]["input_ids"]) == 6


def _language(rows: Rows, **settings: Any) -> Any:
    return _problem("causal-lm", rows, **settings)


def _spelled(tokenizer: Any, example: dict[str, Any]) -> tuple[str, str]:
    """Input and labels as words, with . where a label does not count."""
    kept = [t if t != IGNORED else None for t in example["labels"]]
    labels = ["." if t is None else tokenizer.convert_ids_to_tokens(t) for t in kept]
    words = tokenizer.convert_ids_to_tokens(example["input_ids"])
    return " ".join(words), " ".join(labels)


def test_prompt_is_masked_exactly() -> None:
    """Only the completion and the end token count; the prompt's own start token does not."""
    tokenizer = decoder_tokenizer()
    rows = [{"prompt": "the cat ", "completion": "sleeps not"}]
    [example] = _language(rows).encode(tokenizer, 32)["train"]
    assert _spelled(tokenizer, example) == (
        "<s> the cat sleeps not </s>",
        ". . . sleeps not </s>",
    )


def test_prompt_keeps_its_tokens_where_joining_would_change_them() -> None:
    """`bird` + `s` is another word when joined, but generation starts after `bird`."""
    tokenizer = decoder_tokenizer()
    rows = [{"prompt": "the cat bird", "completion": "runs"}]
    [example] = _language(rows).encode(tokenizer, 32)["train"]
    assert _spelled(tokenizer, example) == ("<s> the cat bird runs </s>", ". . . . runs </s>")


def test_end_token_of_the_tokenizer_is_not_doubled() -> None:
    """A tokenizer that ends every text by itself does not end the prompt."""
    tokenizer = encoder_tokenizer()
    tokenizer.eos_token = "[SEP]"
    rows = [{"prompt": "the cat ", "completion": "runs"}]
    [example] = _language(rows).encode(tokenizer, 32)["train"]
    assert _spelled(tokenizer, example) == ("[CLS] the cat runs [SEP]", ". . . runs [SEP]")


def test_long_prompt_loses_its_start() -> None:
    """The completion is what is learnt, so it is kept."""
    tokenizer = decoder_tokenizer()
    rows = [{"prompt": "the red blue green cat ", "completion": "runs sleeps"}]
    [example] = _language(rows).encode(tokenizer, 5)["train"]
    assert _spelled(tokenizer, example) == ("green cat runs sleeps </s>", ". . runs sleeps </s>")
    [example] = _language(rows).encode(tokenizer, 3)["train"]
    assert _spelled(tokenizer, example) == ("cat runs sleeps", ". runs sleeps")


def test_plain_text_is_cut_into_pieces_without_loss() -> None:
    """All tokens count, the end token included; a lone last token is left out."""
    tokenizer = decoder_tokenizer()
    rows = [{"text": "the cat runs a dog"}, {"text": "red"}]
    examples = _language(rows).encode(tokenizer, 3)["train"]
    assert [_spelled(tokenizer, e)[0] for e in examples] == [
        "<s> the cat",
        "runs a dog",
        "<s> red </s>",
    ]
    assert all(e["labels"] == e["input_ids"] for e in examples)


CHAT = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "runs"},
    {"role": "user", "content": "not"},
    {"role": "assistant", "content": "sleeps"},
]


def test_only_the_assistant_counts_where_the_template_marks_it() -> None:
    """Every turn of the assistant, and nothing of the user."""
    tokenizer = decoder_tokenizer(TEMPLATE)
    [example] = _language([{"messages": CHAT}]).encode(tokenizer, 32)["train"]
    words, labels = _spelled(tokenizer, example)
    assert "user: the cat answer: runs </s> user: not answer: sleeps </s>" in words
    assert labels.replace(".", "").split() == ["runs", "</s>", "sleeps", "</s>"]


def test_everything_counts_where_the_template_marks_nothing() -> None:
    """Without {% generation %} the turns cannot be told apart."""
    plain = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer = decoder_tokenizer(plain)
    [example] = _language([{"messages": CHAT}]).encode(tokenizer, 32)["train"]
    assert example["labels"] == example["input_ids"]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"a": "x"}], {}, "expected a column messages or prompt.choices.answer or .*text, found"),
        ([{"text": None}], {}, "row 1: expected text in column 'text', found None"),
        ([{"messages": "x"}], {}, "row 1: expected messages with role and content"),
        ([{"messages": []}], {}, "row 1: expected messages with role and content"),
        ([{"messages": [{"content": "x"}]}], {}, "row 1: expected messages with role"),
        ([{"text": "x"}], {"prompt_column": "text"}, "completion_column is missing"),
        ([{"text": "x"}], {"label_column": "text"}, "label_column does not apply to task causal"),
        (
            [{"text": "x"}],
            {"text_column": "text", "messages_column": "text"},
            "columns are set for chat and text",
        ),
    ],
)
def test_mistakes_in_texts(rows: Rows, settings: dict[str, Any], message: str) -> None:
    """One line each."""
    with pytest.raises(DeltakitError, match=message):
        _language(rows, **settings)


def test_no_chat_template() -> None:
    """The way out is named."""
    with pytest.raises(DataError, match="no chat template; use prompt and completion"):
        _language([{"messages": CHAT}]).encode(decoder_tokenizer(), 32)


def test_nothing_to_learn_from() -> None:
    """Empty texts leave no token."""
    tokenizer = decoder_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="train split: no token is left"):
        _language([{"text": ""}]).encode(tokenizer, 32)


def test_language_scores_against_a_plain_loop() -> None:
    """Summed log-likelihood, hits and counts per example, each token predicted from before it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    labels = torch.tensor([[1, 2, 3, IGNORED, IGNORED], [IGNORED, IGNORED, 4, 0, 6]])
    found = _language([{"text": "a"}]).reduce(logits, labels)
    for row in range(2):
        loss, right, count = 0.0, 0, 0
        for at in range(1, 5):
            if labels[row, at] != IGNORED:
                scores = logits[row, at - 1].double()
                loss -= float(scores.log_softmax(0)[labels[row, at]])
                right += int(scores.argmax() == labels[row, at])
                count += 1
        assert found[row].tolist() == pytest.approx([loss, right, count], rel=1e-6)


def test_padding_is_as_long_as_the_batch_needs() -> None:
    """Labels are padded so that they do not count, and unknown inputs are left out."""
    collator = Collator(9, {"input_ids", "attention_mask", "labels"})
    examples = [
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": [1, 2, 3], "other": [0]},
        {"input_ids": [4], "attention_mask": [1], "labels": [4], "other": [0]},
    ]
    batch = collator(examples)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_class_labels_become_a_vector() -> None:
    """int64 for classes, float32 for numbers, as the losses want them."""
    for labels, dtype in (([1, 0], torch.int64), ([0.5, 1.0], torch.float32)):
        examples = [{"input_ids": [1], "labels": label} for label in labels]
        batch = Collator(0, {"input_ids", "labels"})(examples)
        assert batch["labels"].dtype == dtype
        assert batch["labels"].shape == (2,)


def test_tokenizer_without_padding_is_refused_for_labels() -> None:
    """A classifier needs a padding token to find the last word."""
    with pytest.raises(DataError, match="neither a padding nor an end token"):
        _classes(_labelled(0, 1)).encode(decoder_tokenizer(), 32)


def test_predictions_are_told_by_name() -> None:
    """One example as plain JSON."""
    problem = _classes(_labelled("no", "yes"))
    told = problem.tell(np.array([0.5, 1.5], np.float32), 0)
    assert told == {"prediction": "yes", "label": "no", "logits": [0.5, 1.5]}
