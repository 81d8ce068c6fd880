"""Chats: lists of messages, encoded by the tokenizer's own template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from deltakit.errors import DataError
from deltakit.training.data import Table, check_columns
from deltakit.training.task import IGNORED, Example

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chats_of(table: Table, column: str, *, answered: bool = False) -> list[Any]:
    """A column of chats; DataError names the first row that is no list of role and content.

    answered: the last message must be the assistant's, after another one.
    """
    check_columns(table, column)
    chats = []
    for number, row in table.numbered():
        chat = row.get(column)
        if not isinstance(chat, list) or not chat or not all(_is_message(m) for m in chat):
            raise DataError(
                f"data {table.origin} row {number}: expected messages with role and content in "
                f"column {column!r}, found {chat!r:.60}"
            )
        if answered and (len(chat) < 2 or chat[-1]["role"] != "assistant"):
            raise DataError(
                f"data {table.origin} row {number}: generate_metrics needs a chat that ends with "
                f"the assistant's answer, found one that ends with {chat[-1]['role']}"
            )
        chats.append(chat)
    return chats


def marks_answers(tokenizer: Any) -> bool:
    """Whether the tokenizer's template marks the assistant's turns ({% generation %})."""
    return bool(_GENERATION.search(tokenizer.chat_template or ""))


def chat_examples(tokenizer: Any, longest: int, chats: Sequence[Any]) -> list[Example]:
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


def chat_prompts(tokenizer: Any, chats: Sequence[Any]) -> list[list[int]]:
    """Chats less their last message, as the template opens the answer."""
    return [
        list(
            tokenizer.apply_chat_template(
                chat[:-1], tokenize=True, return_dict=True, add_generation_prompt=True
            )["input_ids"]
        )
        for chat in chats
    ]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)
