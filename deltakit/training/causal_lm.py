"""Causal language modelling: prompts with completions, chats, or plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltakit.dtypes import Array
from deltakit.errors import ConfigError, DataError
from deltakit.training.chat import chat_examples, chats_of
from deltakit.training.columns import choose_columns, texts_of
from deltakit.training.data import Table
from deltakit.training.metrics import LANGUAGE, language_metrics
from deltakit.training.task import IGNORED, Example, Head, TaskSettings

_FORMS = {
    "chat": ("messages_column",),
    "completion": ("prompt_column", "completion_column"),
    "text": ("text_column",),
}
_USUAL = {"chat": ("messages",), "completion": ("prompt", "completion"), "text": ("text",)}


def causal_lm(
    tables: Mapping[str, Table], settings: TaskSettings, head: Head | None
) -> LanguageProblem:
    """The problem posed by chats, prompts with completions, or texts, by the columns there are.

    Raises DataError for unknown columns and rows without text, ConfigError for settings that
    contradict each other or do not belong to this task.
    """
    for name in ("text_pair_column", "label_column", "problem_type", "num_labels"):
        if getattr(settings, name) is not None:
            raise ConfigError(f"setting {name} does not apply to task causal-lm")
    first = next(iter(tables.values()))
    form, columns = _form(first, settings)
    read = chats_of if form == "chat" else texts_of
    parts = {split: [read(table, c) for c in columns] for split, table in tables.items()}
    return LanguageProblem(form, parts, (f"{form} from {', '.join(columns)}",))


def _form(table: Table, settings: TaskSettings) -> tuple[str, tuple[str, ...]]:
    asked = [form for form, names in _FORMS.items() if any(getattr(settings, n) for n in names)]
    if len(asked) > 1:
        raise ConfigError(f"columns are set for {' and '.join(asked)}; set them for one only")
    if not asked:
        columns = choose_columns(table, (), tuple(_USUAL.values()))
        return next(form for form, names in _USUAL.items() if names == columns), columns
    given = [getattr(settings, name) for name in _FORMS[asked[0]]]
    missing = [name for name, value in zip(_FORMS[asked[0]], given, strict=True) if value is None]
    if missing:
        raise ConfigError(f"setting {missing[0]} is missing; {asked[0]} needs it")
    return asked[0], choose_columns(table, given, ())


@dataclass(frozen=True)
class LanguageProblem:
    """Texts to continue. form: "chat", "completion" or "text"; parts: split -> its columns."""

    form: str
    parts: Mapping[str, list[list[Any]]]
    notes: Sequence[str]

    model_class = "AutoModelForCausalLM"
    metric_names = LANGUAGE

    @property
    def config_changes(self) -> Mapping[str, Any]:
        """None: the base's own head is used."""
        return {}

    def encode(self, tokenizer: Any, longest: int) -> dict[str, list[Example]]:
        """Token ids and labels of every row; DataError for a split in which no token counts."""
        encode = _ENCODERS[self.form]
        encoded = {s: encode(tokenizer, longest, *columns) for s, columns in self.parts.items()}
        for split, examples in encoded.items():
            if not any(label != IGNORED for e in examples for label in e["labels"][1:]):
                raise DataError(f"{split} split: no token is left to learn from")
        return encoded

    def reduce(self, logits: Any, labels: Any) -> Any:
        """[batch, tokens, vocabulary], [batch, tokens] -> float64 [batch, 3]; see metrics."""
        ahead = labels[:, 1:]
        counts = ahead != IGNORED
        target = ahead.where(counts, 0)
        scores = logits[:, :-1].float()
        chosen = scores.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        surprise = (scores.logsumexp(-1) - chosen).double() * counts
        right = (scores.argmax(-1) == target) & counts
        sums = surprise.new_empty(len(surprise), 3)
        sums[:, 0], sums[:, 1], sums[:, 2] = surprise.sum(1), right.sum(1), counts.sum(1)
        return sums

    def metrics(self, reduced: Array, labels: Array) -> dict[str, float]:
        """Loss, perplexity and token accuracy over all tokens that count."""
        return language_metrics(reduced)

    def tell(self, reduced: Array, label: Any) -> dict[str, Any]:
        """Summed negative log-likelihood, tokens predicted right, and tokens that count."""
        loss, right, count = reduced
        return {"loss_sum": float(loss), "right": int(right), "tokens": int(count)}


def completion_examples(
    tokenizer: Any, longest: int, prompts: list[str], completions: list[str]
) -> list[Example]:
    """Prompt and completion as one sequence; only the completion and the end token count.

    Both are encoded together, as the text they make, unless that changes the prompt's own tokens:
    then they are encoded apart, so that training sees the tokens that generation will start from.
    Too long examples lose the start of their prompt first.
    """
    examples = []
    for prompt, completion in zip(prompts, completions, strict=True):
        opening = _without_end(tokenizer, tokenizer(prompt)["input_ids"])
        together = _without_end(tokenizer, tokenizer(prompt + completion)["input_ids"])
        if together[: len(opening)] == opening:
            answer = together[len(opening) :]
        else:
            answer = tokenizer(completion, add_special_tokens=False)["input_ids"]
        answer = _with_end(tokenizer, answer)[: longest - 1]
        opening = opening[-(longest - len(answer)) :]
        examples.append(_example(opening + answer, [IGNORED] * len(opening) + answer))
    return examples


def text_examples(tokenizer: Any, longest: int, texts: list[str]) -> list[Example]:
    """Texts with their end token, cut into pieces of at most `longest` tokens; all tokens count.

    Pieces of a single token have nothing to predict and are left out.
    """
    examples = []
    for text in texts:
        tokens = _with_end(tokenizer, _without_end(tokenizer, tokenizer(text)["input_ids"]))
        pieces = [tokens[at : at + longest] for at in range(0, len(tokens), longest)]
        examples += [_example(piece, piece) for piece in pieces if len(piece) > 1]
    return examples


def _example(tokens: list[int], labels: list[int]) -> Example:
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def _without_end(tokenizer: Any, tokens: list[int]) -> list[int]:
    # some tokenizers end every text by themselves; the end belongs after the completion
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    return tokens[:-1] if tokens and tokens[-1] in ends and tokens[-1] is not None else tokens


def _with_end(tokenizer: Any, tokens: list[int]) -> list[int]:
    return tokens if tokenizer.eos_token_id is None else [*tokens, tokenizer.eos_token_id]


# (tokenizer, longest, a list per column) -> examples with labels as long as input_ids
_ENCODERS: dict[str, Callable[..., list[Example]]] = {
    "chat": chat_examples,
    "completion": completion_examples,
    "text": text_examples,
}
