"""Batches with dynamic padding: as long as their longest example, and no longer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch.utils.data import Dataset

from deltakit.training.task import IGNORED, Example


class Examples(Dataset[Example]):
    """Encoded examples, kept in memory."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


@dataclass(frozen=True, slots=True)
class Collator:
    """Stacks examples into int64 tensors [batch, longest], padded on the right.

    pad: the padding token's id. accepted: the names that the model's forward takes; other inputs
    are left out. Labels that are lists are padded with -100, numbers become a vector [batch].
    """

    pad: int
    accepted: Collection[str]

    @classmethod
    def of(cls, model: torch.nn.Module, tokenizer: Any) -> Collator:
        """The collator of a model; without a padding token, padding is masked zeros."""
        pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return cls(pad, frozenset(signature(model.forward).parameters))

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """One batch."""
        filler = {"input_ids": self.pad, "labels": IGNORED}
        batch = {}
        for key, first in examples[0].items():
            if key not in self.accepted:
                continue
            column = [example[key] for example in examples]
            if isinstance(first, list):
                longest = max(map(len, column))
                rest = filler.get(key, 0)
                column = [[*items, *[rest] * (longest - len(items))] for items in column]
            batch[key] = torch.tensor(column)
        return batch
