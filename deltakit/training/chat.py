"""Chats: lists of messages, encoded by the tokenizer's own template."""

from __future__ import annotations

import re
from typing import Any

from deltakit.errors import DataError
from deltakit.training.data import Table, check_columns
from deltakit.training.task import IGNORED, Example

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chats_of(table: Table, column: str) -> list[Any]:
    """A column of chats; DataError names the first row that is no list of role and content."""
    check_columns(table, column)
    chats = []
    for number, row in table.numbered():
        chat = row.get(column)
        if not isinstance(chat, list) or not chat or not all(_is_message(m) for m in chat):
            raise DataError(
                f"data {table.origin} row {number}: expected messages with role and content in "
                f"column {column!r}, found {chat!r:.60}"
            )
        chats.append(chat)
    return chats


def marks_answers(tokenizer: Any) -> bool:
    """Whether the tokenizer's template marks the assistant's turns ({% generation %})."""
    return bool(_GENERATION.search(tokenizer.chat_template or ""))


def chat_examples(tokenizer: Any, longest: int, chats: list[Any]) -> list[Example]:
    """Chats as the template writes them, cut at `longest` tokens.

    Where the template marks the assistant's turns, only their tokens count; otherwise all do.
    Raises DataError when the tokenizer has no template.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template; use prompt and completion columns, or plain text"
        )
    marked = marks_answers(tokenizer)
    examples = []
    for chat in chats:
        encoded = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=marked
        )
        tokens = encoded["input_ids"][:longest]
        counts = encoded["assistant_masks"][:longest] if marked else [1] * len(tokens)
        labels = [token if count else IGNORED for token, count in zip(tokens, counts, strict=True)]
        mask = [1] * len(tokens)
        examples.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return examples


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)
