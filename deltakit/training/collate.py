"""Batches with dynamic padding: as long as their longest example, and no longer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
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
    """Stacks examples into tensors [batch, ...].

    Lists become int64 [batch, longest], padded on the right: input_ids with the padding token,
    labels with -100. Numbers become a vector [batch], arrays of one shape `dtype`.

    pad: the padding token's id. accepted: the names that the model's forward takes; other inputs
    are left out. shift: gives a sequence-to-sequence model's decoder inputs from its labels.
    """

    pad: int
    accepted: Collection[str]
    dtype: torch.dtype = torch.float32
    shift: Callable[[torch.Tensor], torch.Tensor] | None = None

    @classmethod
    def of(cls, model: Any, processor: Any) -> Collator:
        """The collator of a model; without a padding token, padding is masked zeros."""
        pad = getattr(processor, "pad_token_id", None)
        return cls(
            0 if pad is None else pad,
            frozenset(signature(model.forward).parameters),
            getattr(model, "dtype", torch.float32),
            getattr(model, "prepare_decoder_input_ids_from_labels", None),
        )

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """One batch."""
        keys = [key for key in examples[0] if key in self.accepted]
        batch = {key: self._stacked(key, [example[key] for example in examples]) for key in keys}
        if self.shift is not None and batch["labels"].ndim == 2:
            batch["decoder_input_ids"] = self.shift(batch["labels"])
        return batch

    def _stacked(self, key: str, column: list[Any]) -> torch.Tensor:
        if isinstance(column[0], np.ndarray):
            return torch.from_numpy(np.stack(column)).to(self.dtype)
        if isinstance(column[0], list):
            filler = {"input_ids": self.pad, "labels": IGNORED}.get(key, 0)
            longest = max(map(len, column))
            column = [[*items, *[filler] * (longest - len(items))] for items in column]
        return torch.tensor(column)
