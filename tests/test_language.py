"""Language tasks beyond prompts: targets of sources, options, and texts that the model writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    TEMPLATE,
    decoder_tokenizer,
    target_tokenizer,
    write_gpt2,
    write_llama,
    write_t5,
)
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from deltakit.errors import ConfigError, DataError, DeltakitError
from deltakit.training.collate import Collator
from deltakit.training.data import table_of
from deltakit.training.generation import generate_texts
from deltakit.training.task import IGNORED, Live, TaskSettings
from deltakit.training.tasks import TASKS

Rows = list[dict[str, Any]]
WORDS = ["red", "green cat", "blue dog runs"]


def _problem(task: str, rows: Rows, **settings: Any) -> Any:
    return TASKS[task]({"train": table_of(rows, "rows")}, TaskSettings(**settings), None)


def _live(folder: Path, kind: str, batch_size: int = 2) -> Live:
    write, tokenizer, auto = {
        "llama": (write_llama, decoder_tokenizer(TEMPLATE), AutoModelForCausalLM),
        "gpt2": (write_gpt2, decoder_tokenizer(), AutoModelForCausalLM),
        "t5": (write_t5, target_tokenizer(), AutoModelForSeq2SeqLM),
    }[kind]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = auto.from_pretrained(write(folder)).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():  # far enough from uniform that inputs matter
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.5)
    return Live(model, tokenizer, 32, batch_size)


def test_target_is_learnt_and_source_is_read() -> None:
    """Inputs and labels end once each; labels are padded so that they do not count."""
    rows = [{"source": "the cat", "target": "red"}, {"source": "a", "target": "not very"}]
    problem = _problem("seq2seq-lm", rows)
    tokenizer = target_tokenizer()
    examples = problem.encode(tokenizer, 32)["train"]
    spelled = [tokenizer.convert_ids_to_tokens(e["labels"]) for e in examples]
    assert spelled == [["red", "</s>"], ["not", "very", "</s>"]]
    batch = Collator(tokenizer.pad_token_id, {"input_ids", "labels"})(examples)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 3)
    assert batch["labels"][0, 2] == IGNORED
    short = problem.encode(tokenizer, 2)["train"][1]
    assert tokenizer.convert_ids_to_tokens(short["labels"]) == ["not", "</s>"]


def test_decoder_inputs_are_the_model_s_own(tmp_path: Path) -> None:
    """With them given, loss and logits are those that the model makes from labels alone."""
    live = _live(tmp_path / "t5", "t5")
    rows = [{"source": "the cat", "target": "red"}, {"source": "a", "target": "not very"}]
    examples = _problem("seq2seq-lm", rows).encode(live.processor, 32)["train"]
    batch = Collator.of(live.model, live.processor)(examples)
    alone = {key: value for key, value in batch.items() if key != "decoder_input_ids"}
    assert set(batch) - set(alone) == {"decoder_input_ids"}
    given, made = live.model(**batch), live.model(**alone)
    assert torch.equal(given.loss, made.loss)
    assert torch.equal(given.logits, made.logits)


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        (("source", "target"), "target"),
        (("text", "summary"), "target"),
        (("question", "answer"), "target"),
        (("question", "choices", "answer"), "choice"),
    ],
)
def test_usual_columns_of_targets(columns: tuple[str, ...], form: str) -> None:
    """The more particular group wins."""
    cells = {"choices": ["red", "blue"], "answer": "red"}
    problem = _problem("seq2seq-lm", [{name: cells.get(name, "the cat") for name in columns}])
    assert problem.form == form


@pytest.mark.parametrize(
    ("task", "row", "settings", "message"),
    [
        ("seq2seq-lm", {"source": "a", "target": 3}, {}, "row 1: expected text or texts in column"),
        ("seq2seq-lm", {"source": "a", "target": []}, {}, "row 1: expected text or texts in colu"),
        ("seq2seq-lm", {"a": "x"}, {"source_column": "a"}, "target_column is missing"),
        ("seq2seq-lm", {"a": "x"}, {"choices_column": "a"}, "source_column is missing"),
        ("seq2seq-lm", {"a": "x"}, {"prompt_column": "a"}, "does not apply to task seq2seq-lm"),
        (
            "seq2seq-lm",
            {"a": "x"},
            {"target_column": "a", "choices_column": "a"},
            "columns are set for options and for a target",
        ),
        (
            "causal-lm",
            {"prompt": "a", "choices": ["b"], "answer": 0},
            {},
            "row 1: expected two texts or more in column 'choices'",
        ),
        (
            "causal-lm",
            {"prompt": "a", "choices": ["b", "c"], "answer": 2},
            {},
            "row 1: expected one of the 2 options in column 'answer', by its place from 0",
        ),
        (
            "causal-lm",
            {"prompt": "a", "choices": ["b", "b"], "answer": "b"},
            {},
            "expected one of the 2 options",
        ),
        ("causal-lm", {"text": "a"}, {"generate_metrics": ("bleu",)}, "plain text has none"),
        (
            "causal-lm",
            {"messages": [{"role": "user", "content": "a"}]},
            {"generate_metrics": ("bleu",)},
            "row 1: generate_metrics needs a chat that ends with the assistant's answer",
        ),
    ],
)
def test_mistakes(task: str, row: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    """One line each."""
    with pytest.raises(DeltakitError, match=message) as caught:
        _problem(task, [row], **settings)
    assert isinstance(caught.value, (DataError, ConfigError))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (["red", "blue"], 1),
        (["red", "blue"], "blue"),
        ({"text": ["red", "blue"], "label": ["A", "B"]}, "B"),
        ({"text": ["red", "blue"]}, "blue"),
    ],
)
def test_the_right_option_by_place_label_or_text(choices: Any, answer: Any) -> None:
    """And it is what is learnt."""
    problem = _problem("causal-lm", [{"prompt": "a ", "choices": choices, "answer": answer}])
    rows = problem.rows["train"]
    assert (rows.options, rows.right, rows.answers) == ([["red", "blue"]], [1], [["blue"]])
    assert problem.metric_names[:2] == ("accuracy", "accuracy_norm")


def _likelihood(live: Live, prompt: str, option: str) -> float:
    """log p(option | prompt) by one forward pass over exactly those tokens."""
    tokenizer, model = live.processor, live.model
    words = tokenizer(option, add_special_tokens=False)["input_ids"]
    if model.config.is_encoder_decoder:
        source = torch.tensor([tokenizer(prompt)["input_ids"]])
        start = torch.tensor([[model.config.decoder_start_token_id, *words]])
        logits = model(input_ids=source, decoder_input_ids=start).logits[0]
    else:
        opening = tokenizer(prompt)["input_ids"]
        logits = model(input_ids=torch.tensor([opening + words])).logits[0, len(opening) - 1 :]
    scores = logits.double().log_softmax(-1)
    return sum(float(scores[at, word]) for at, word in enumerate(words))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@torch.no_grad()
def test_options_against_one_forward_pass_each(kind: str, tmp_path: Path) -> None:
    """Whatever the padding and the number of options: the likeliest is chosen, both ways."""
    live = _live(tmp_path / kind, kind)
    prompts = ["the cat ", "a dog sleeps and ", "not ", "very very "]
    options = [WORDS, WORDS[1:], [WORDS[2], WORDS[0]], WORDS[::-1]]
    found: dict[str, list[bool]] = {"accuracy": [], "accuracy_norm": []}
    rows = []
    for prompt, texts in zip(prompts, options, strict=True):
        sums = [_likelihood(live, prompt, text) for text in texts]
        norms = [s / len(text) for s, text in zip(sums, texts, strict=True)]
        best = max(range(len(texts)), key=sums.__getitem__)
        rows.append({"prompt": prompt, "choices": texts, "answer": best})
        found["accuracy"].append(True)
        found["accuracy_norm"].append(max(range(len(texts)), key=norms.__getitem__) == best)
    rows[0]["answer"] = (rows[0]["answer"] + 1) % 3  # one is wrong on purpose
    found["accuracy"][0] = False
    norms = [_likelihood(live, prompts[0], t) / len(t) for t in WORDS]
    found["accuracy_norm"][0] = norms.index(max(norms)) == rows[0]["answer"]
    problem = _problem("seq2seq-lm" if kind == "t5" else "causal-lm", rows)
    expected = {name: sum(right) / 4 for name, right in found.items()}
    assert problem.live_metrics("train", live) == expected
    assert expected["accuracy"] == 0.75


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@torch.no_grad()
def test_writing_in_batches_is_writing_alone(kind: str, tmp_path: Path) -> None:
    """The likeliest token again and again, from logits alone, until the end token."""
    live = _live(tmp_path / kind, kind, batch_size=3)
    tokenizer, model = live.processor, live.model
    texts = ["the cat", "a", "the very red dog sleeps and sings"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    expected = []
    for prompt in prompts:
        written: list[int] = []
        while len(written) < 5 and tokenizer.eos_token_id not in written:
            if model.config.is_encoder_decoder:
                start = torch.tensor([[model.config.decoder_start_token_id, *written]])
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=start).logits
            else:
                logits = model(input_ids=torch.tensor([prompt + written])).logits
            written.append(int(logits[0, -1].argmax()))
        expected.append(tokenizer.decode(written, skip_special_tokens=True))
    model.generation_config.eos_token_id = None  # the tokenizer's alone
    found = generate_texts(live, prompts, 5)
    assert found == expected
    assert len(set(found)) > 1


def test_generated_texts_are_scored_against_all_references(tmp_path: Path) -> None:
    """The first reference is learnt, any is right."""
    live = _live(tmp_path / "llama", "llama")
    [text] = generate_texts(live, [live.processor("the cat")["input_ids"]], 3)
    rows = [{"prompt": "the cat", "completion": ["no", text]}]
    problem = _problem("causal-lm", rows, generate_metrics=("exact_match",), max_new_tokens=3)
    assert problem.live_metrics("train", live) == {"exact_match": 1.0}
    assert problem.metric_names == ("loss", "perplexity", "token_accuracy", "exact_match")


def test_chats_are_continued_at_the_last_answer() -> None:
    """The prompt is the chat without it."""
    chat = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "runs"},
        {"role": "user", "content": "not"},
        {"role": "assistant", "content": "sleeps"},
    ]
    settings = {"generate_metrics": ("exact_match",), "max_new_tokens": 3}
    problem = _problem("causal-lm", [{"messages": chat}], **settings)
    tokenizer = decoder_tokenizer(TEMPLATE)
    [prompt] = problem.encode_prompts(tokenizer, 32, problem.rows["train"].prompts)
    assert tokenizer.decode(prompt).endswith("answer: runs </s> user: not")
    assert problem.rows["train"].answers == [["sleeps"]]


def test_no_room_for_a_prompt() -> None:
    """Said when the data is encoded, before a model is there."""
    rows = [{"prompt": "a ", "completion": "b"}]
    problem = _problem("causal-lm", rows, generate_metrics=("bleu",), max_new_tokens=32)
    with pytest.raises(ConfigError, match="max_new_tokens: 32 leave no room for a prompt"):
        problem.encode(decoder_tokenizer(), 32)
