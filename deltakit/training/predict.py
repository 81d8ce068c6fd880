"""Evaluating a model as it stands: metrics, and every example's logits down to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from deltakit.dtypes import Array
from deltakit.live.arrays import to_numpy
from deltakit.training.collate import Collator
from deltakit.training.task import IGNORED, Example, Problem


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model says about examples.

    reduced: [n, ...] as `Problem.reduce` gives it, padded with -100 in its second dimension where
    batches differ in length (as the Trainer does). labels: [n] or [] where labels are sequences.
    digests: per example the sha256 of its logits' bits, padding left out; empty unless asked for.
    """

    reduced: Array
    labels: Array
    digests: Sequence[str]

    @property
    def digest(self) -> str | None:
        """One sha256 over all examples' digests in order; equal only for equal logits."""
        return sha256("".join(self.digests).encode()).hexdigest() if self.digests else None


@torch.no_grad()
def predict(
    model: Any,
    problem: Problem,
    examples: Sequence[Example],
    collator: Collator,
    *,
    batch_size: int,
    mixed_precision: bool = False,
    digests: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Run a model over examples in order, in batches of `batch_size`, as training evaluates it.

    The batches decide the padding and so the last bits of the logits: compare models at equal
    batch sizes. mixed_precision: bfloat16 autocast. progress: called with (examples done, examples
    in all).
    """
    model.eval()
    device = next(model.parameters()).device
    cast = torch.autocast(device.type, torch.bfloat16) if mixed_precision else nullcontext()
    reduced, labels, found = [], [], []
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        batch = {key: tensor.to(device) for key, tensor in collator(part).items()}
        with cast:
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        reduced.append(problem.reduce(logits, batch["labels"]).cpu().numpy())
        labels += [e["labels"] for e in part if not isinstance(e["labels"], list)]
        if digests:
            found += [_digest(logits[row], e["labels"]) for row, e in enumerate(part)]
        if progress is not None:
            progress(start + len(part), len(examples))
    return Predictions(_joined(reduced), np.asarray(labels), found)


def _joined(parts: list[Array]) -> Array:
    longest = max((part.shape[1] for part in parts if part.ndim > 2), default=None)
    if longest is None:
        return np.concatenate(parts)
    filled = []
    for part in parts:
        widths = [(0, 0), (0, longest - part.shape[1]), *[(0, 0)] * (part.ndim - 2)]
        filled.append(np.pad(part, widths, constant_values=IGNORED))
    return np.concatenate(filled)


def _digest(logits: torch.Tensor, labels: Any) -> str:
    kept = logits[: len(labels)] if isinstance(labels, list) else logits
    return sha256(to_numpy(kept).tobytes()).hexdigest()
