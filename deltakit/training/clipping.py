"""Clipping by the norm of all gradients that move anything: those of entries and extras."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite

import torch

from deltakit.errors import TrainingError


def clip_to(
    largest: float | None,
    gradients: Sequence[torch.Tensor],
    step: int,
    total: Callable[[torch.Tensor], None] | None = None,
) -> float:
    """The gradients' norm together; where it is above `largest`, they are scaled down to that.

    total: adds to a number those of the other processes, where each has gradients of its own.
    Raises TrainingError for a norm that is not finite; step: names it there.
    """
    norms = torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients])
    together = torch.linalg.vector_norm(norms)
    if total is not None:
        total(together.square_())
        together.sqrt_()
    norm = float(together)
    if not isfinite(norm):
        raise TrainingError(
            f"step {step}: the gradient of the trained entries is not finite ({norm}); "
            "lower the learning rate, clip gradients or look for broken inputs"
        )
    if largest and norm > largest:
        for gradient in gradients:
            gradient.mul_(largest / (norm + 1e-6))
    return norm
