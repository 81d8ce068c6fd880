"""Exact top-k over a stream of scored entries, in memory that depends on k alone."""

from __future__ import annotations

import numpy as np
import torch

from deltakit.kernels.dispatch import runs_ahead

SMALLEST = 1.401298464324817e-45  # the least positive float32: zero scores are not streamed
SLACK = 256  # entries beyond 2 k that may gather before the pool is cut back to k
SAMPLE_STRIDE = 16


class TopK:
    """The k entries of highest score; ties go to the earlier tensor, then to the lower index.

    An entry may be dropped as soon as k better ones are pooled, so the k-th best score so far is
    a threshold that only rises. floor: entries below it are not worth pooling. By default that is
    every score of zero: when fewer than k score above zero, the caller fills up in tie order.
    """

    def __init__(self, k: int, floor: float = SMALLEST) -> None:
        self.k = k
        self.threshold = self._floor = floor
        self._parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._count = 0

    def raise_threshold(self, scores: torch.Tensor) -> None:
        """Raise the threshold by a strided sample of scores [n] that are about to be offered.

        The k-th best of any k or more entries bounds the k-th best of all from below.
        """
        sample = scores[::SAMPLE_STRIDE]
        if self.threshold == self._floor and len(sample) >= self.k > 0:
            kth = torch.topk(sample, self.k).values[-1].item()
            self.threshold = max(self.threshold, kth)

    def offer(
        self, tensor: int, scores: torch.Tensor, indices: torch.Tensor, gradients: torch.Tensor
    ) -> None:
        """Pool entries: scores float32 [n], flat indices int64 [n], gradients float [n]."""
        if not self.k or not len(scores):
            return
        owners = torch.full_like(indices, tensor)
        self._parts.append((scores, owners, indices, gradients))
        self._count += len(scores)
        if self._count >= 2 * self.k + SLACK:
            self._cut()

    def result(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tensor [m], index [m], gradient [m]) of the best m <= k entries, in tie order."""
        return self.scored()[1:]

    def scored(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same with their scores [m] in front."""
        if not self._parts:
            empty = torch.zeros(0, dtype=torch.int64)
            return torch.zeros(0), empty, empty, torch.zeros(0)
        self._cut()
        scores, owners, indices, gradients = self._parts[0]
        order = _tie_order(scores, owners, indices)
        return scores[order], owners[order], indices[order], gradients[order]

    def _cut(self) -> None:
        """Keep the best k of what is pooled; only ties at the threshold are put in order."""
        columns = [torch.cat(part) for part in zip(*self._parts, strict=True)]
        scores, owners, indices, _ = columns
        if len(scores) > self.k:
            kth = _kth(scores, self.k)
            keep = scores > kth
            ties = (scores == kth).nonzero()[:, 0]
            order = _tie_order(scores[ties], owners[ties], indices[ties])
            keep[ties[order[: self.k - int(keep.sum())]]] = True
            columns = [column[keep] for column in columns]
            self.threshold = max(self.threshold, kth)
        self._parts = [(columns[0], columns[1], columns[2], columns[3])]
        self._count = len(columns[0])


def _kth(scores: torch.Tensor, k: int) -> float:
    """The k-th largest of n > k scores."""
    if not runs_ahead(scores):  # NumPy's partition is several times faster than torch's topk
        return float(np.partition(scores.numpy(), -k)[-k])
    return torch.topk(scores, k, sorted=False).values.min().item()


def _tie_order(scores: torch.Tensor, owners: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Positions [n] by higher score, then earlier tensor, then lower index."""
    if not runs_ahead(scores):  # NumPy has one sort for all three on a CPU
        return torch.from_numpy(np.lexsort((indices.numpy(), owners.numpy(), -scores.numpy())))
    order = indices.argsort(stable=True)
    for key in (owners, -scores):
        order = order[key[order].argsort(stable=True)]
    return order
