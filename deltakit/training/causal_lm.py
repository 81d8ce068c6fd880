"""Causal language modelling: prompts with completions or options, chats, or plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltakit.errors import ConfigError, DataError
from deltakit.training.chat import chat_examples, chat_prompts, chats_of
from deltakit.training.columns import answers_of, choices_of, choose_columns, texts_of
from deltakit.training.data import Table
from deltakit.training.language import (
    TextProblem,
    TextRows,
    room_for_prompt,
    token_sums,
    with_end,
    without_end,
)
from deltakit.training.task import IGNORED, Example, Head, TaskSettings

_FORMS = {
    "chat": ("messages_column",),
    "choice": ("prompt_column", "choices_column", "label_column"),
    "completion": ("prompt_column", "completion_column"),
    "text": ("text_column",),
}
_USUAL = {
    ("messages",): "chat",
    ("prompt", "choices", "answer"): "choice",
    ("question", "choices", "answer"): "choice",
    ("prompt", "completion"): "completion",
    ("text",): "text",
}


def causal_lm(
    tables: Mapping[str, Table], settings: TaskSettings, head: Head | None
) -> CausalProblem:
    """The problem posed by chats, prompts with options or completions, or texts.

    Which of them, the columns tell. A completion may be a list of right ones, of which the first
    is learnt. Prompts, completions and options are joined as they stand. Raises DataError for
    unknown columns and rows without text, ConfigError for settings that contradict each other or
    do not belong to this task.
    """
    used = (name for names in _FORMS.values() for name in names)
    settings.refuse_others("causal-lm", *used, "generate_metrics")
    first = next(iter(tables.values()))
    form, columns = _form(first, settings)
    if settings.generate_metrics and form == "text":
        raise ConfigError("generate_metrics needs prompts; plain text has none")
    rows = {split: _rows(form, table, columns, settings) for split, table in tables.items()}
    return CausalProblem(form, rows, settings, (f"{form} from {', '.join(columns)}",))


def _form(table: Table, settings: TaskSettings) -> tuple[str, tuple[str, ...]]:
    if settings.label_column is not None and settings.choices_column is None:
        raise ConfigError("setting label_column does not apply to task causal-lm without choices")
    asked = [form for form, names in _FORMS.items() if getattr(settings, names[-1])]
    asked = asked or [form for form, names in _FORMS.items() if getattr(settings, names[0])][-1:]
    if len(asked) > 1:
        raise ConfigError(f"columns are set for {' and '.join(asked)}; set them for one only")
    if not asked:
        columns = choose_columns(table, (), tuple(_USUAL))
        return _USUAL[columns], columns
    given = {name: getattr(settings, name) for name in _FORMS[asked[0]]}
    for name, value in given.items():
        if value is None:
            raise ConfigError(f"setting {name} is missing; {asked[0]} needs it")
    return asked[0], choose_columns(table, list(given.values()), ())


def _rows(form: str, table: Table, columns: tuple[str, ...], settings: TaskSettings) -> TextRows:
    if form == "choice":
        return TextRows.of_choices(
            texts_of(table, columns[0]), *choices_of(table, columns[1], columns[2])
        )
    if form == "completion":
        return TextRows(texts_of(table, columns[0]), answers_of(table, columns[1]))
    if form == "text":
        return TextRows(texts_of(table, columns[0]), ())
    chats = chats_of(table, columns[0], answered=bool(settings.generate_metrics))
    return TextRows(chats, [[str(chat[-1].get("content") or "")] for chat in chats])


class CausalProblem(TextProblem):
    """Texts to continue; form: "chat", "choice", "completion" or "text"."""

    model_class = "AutoModelForCausalLM"
    first_label = 1

    def encode_rows(self, tokenizer: Any, longest: int, rows: TextRows) -> list[Example]:
        """One sequence per row, of which completions and answers count; texts cut into pieces."""
        if self.form == "text":
            return text_examples(tokenizer, longest, rows.prompts)
        if self.form == "chat":
            return chat_examples(tokenizer, longest, rows.prompts)
        completions = [answers[0] for answers in rows.answers]
        return completion_examples(tokenizer, longest, rows.prompts, completions)

    def encode_options(
        self, tokenizer: Any, longest: int, prompts: Sequence[str], options: Sequence[str]
    ) -> list[Example]:
        """Prompt and option as one sequence, as for training but without the end token."""
        return completion_examples(tokenizer, longest, prompts, options, end=False)

    def encode_prompts(
        self, tokenizer: Any, longest: int, prompts: Sequence[Any]
    ) -> list[list[int]]:
        """Prompts, or chats up to their last answer; too long ones lose their start."""
        room = room_for_prompt(longest, self.settings.max_new_tokens)
        if self.form == "chat":
            encoded = chat_prompts(tokenizer, prompts)
        else:
            encoded = [without_end(tokenizer, tokenizer(p)["input_ids"]) for p in prompts]
        if not all(encoded):
            raise DataError("generate_metrics needs prompts of a token at least; one is empty")
        return [tokens[-room:] for tokens in encoded]

    def reduce(self, logits: Any, labels: Any) -> Any:
        """Each token is predicted from those before it; see `token_sums`."""
        return token_sums(logits[:, :-1], labels[:, 1:])


def completion_examples(
    tokenizer: Any,
    longest: int,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    end: bool = True,
) -> list[Example]:
    """Prompt and completion as one sequence; only the completion and the end token count.

    Both are encoded together, as the text they make, unless that changes the prompt's own tokens:
    then they are encoded apart, so that training sees the tokens that generation will start from.
    Too long examples lose the start of their prompt first. end: whether to add the end token.
    """
    examples = []
    for prompt, completion in zip(prompts, completions, strict=True):
        opening = without_end(tokenizer, tokenizer(prompt)["input_ids"])
        together = without_end(tokenizer, tokenizer(prompt + completion)["input_ids"])
        if together[: len(opening)] == opening:
            answer = together[len(opening) :]
        else:
            answer = tokenizer(completion, add_special_tokens=False)["input_ids"]
        answer = (with_end(tokenizer, answer) if end else answer)[: longest - 1]
        opening = opening[-(longest - len(answer)) :]
        examples.append(_example(opening + answer, [IGNORED] * len(opening) + answer))
    return examples


def text_examples(tokenizer: Any, longest: int, texts: Sequence[str]) -> list[Example]:
    """Texts with their end token, cut into pieces of at most `longest` tokens; all tokens count.

    Pieces of a single token have nothing to predict and are left out.
    """
    examples = []
    for text in texts:
        tokens = with_end(tokenizer, without_end(tokenizer, tokenizer(text)["input_ids"]))
        pieces = [tokens[at : at + longest] for at in range(0, len(tokens), longest)]
        examples += [_example(piece, piece) for piece in pieces if len(piece) > 1]
    return examples


def _example(tokens: list[int], labels: list[int]) -> Example:
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}
