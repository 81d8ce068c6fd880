"""Clipping by the norm of all gradients that move anything: those of entries and extras."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite

import torch

from deltakit.errors import TrainingError
from deltakit.kernels.dispatch import runs_ahead

Total = Callable[[torch.Tensor], None]


class Clipping:
    """Scales gradients down to a norm of `largest`, and sees to it that norms are finite.

    On a CPU a norm that is not finite raises at once. Where the host runs ahead of a device,
    reading one would make it wait: the norm stays there, gradients of such a step become zeros, so
    that none reaches a value, and `check` raises.
    """

    def __init__(self, largest: float | None) -> None:
        self.largest = largest
        self._broken: torch.Tensor | None = None  # the first such step, int64, or -1
        self._norm: torch.Tensor | None = None  # at that step

    def clip(
        self, gradients: Sequence[torch.Tensor], step: int, total: Total | None = None
    ) -> float | torch.Tensor:
        """The gradients' norm together before they are scaled down, where they are, in place.

        total: adds to a number those of the other processes, where each has gradients of its own.
        step: names it in errors. Raises TrainingError on a CPU for a norm that is not finite. On a
        device the norm is a tensor [], and it is not waited for.
        """
        together = _norm(gradients, total)
        if runs_ahead(together):
            self._clip_unseen(gradients, together, step)
            return together
        norm = float(together)
        if not isfinite(norm):
            raise _not_finite(step, norm)
        if self.largest and norm > self.largest:
            for gradient in gradients:
                gradient.mul_(self.largest / (norm + 1e-6))
        return norm

    def check(self) -> None:
        """Wait for the device; raises TrainingError if some step's norm was not finite."""
        if self._broken is None or self._norm is None:
            return
        step = int(self._broken)
        if step >= 0:
            raise _not_finite(step, float(self._norm))

    def _clip_unseen(
        self, gradients: Sequence[torch.Tensor], norm: torch.Tensor, step: int
    ) -> None:
        broken = norm.isfinite().logical_not_()
        if self._broken is None or self._norm is None:
            self._broken = torch.full_like(norm, -1, dtype=torch.int64)
            self._norm = torch.zeros_like(norm)
        first = broken & (self._broken < 0)
        self._broken.masked_fill_(first, step)
        self._norm.copy_(torch.where(first, norm, self._norm))
        for gradient in gradients:
            if self.largest:
                scale = self.largest / (norm + 1e-6)
                gradient.mul_(scale.masked_fill_(norm <= self.largest, 1.0))
            gradient.masked_fill_(broken, 0.0)


def _norm(gradients: Sequence[torch.Tensor], total: Total | None) -> torch.Tensor:
    norms = torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients])
    together: torch.Tensor = torch.linalg.vector_norm(norms)
    if total is not None:
        total(together.square_())
        together.sqrt_()
    return together


def _not_finite(step: int, norm: float) -> TrainingError:
    return TrainingError(
        f"step {step}: the gradient of the trained entries is not finite ({norm}); "
        "lower the learning rate, clip gradients or look for broken inputs"
    )
