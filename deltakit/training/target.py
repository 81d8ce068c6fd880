"""A live tensor whose entries may be trained, as far as this process holds it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from deltakit.dtypes import Array
from deltakit.training.resting import Resting


def _no_positions() -> torch.Tensor:
    return torch.zeros(0, dtype=torch.int64)


@dataclass(eq=False)
class Target:
    """One live tensor whose entries may be trained.

    name: in checkpoint coordinates. live_name: of the parameter. indices, slots: int64 [n], in
    order of unmasking; entry `indices[i]` of the tensor is entry `slots[i]` of the compact arrays.
    forbidden: int64, flat indices that must not be chosen. start: where in the tensor, flat, the
    weights held by this process begin; indices count from there.
    """

    number: int
    name: str
    live_name: str
    parameter: torch.nn.Parameter
    indices: torch.Tensor = field(default_factory=_no_positions)
    slots: torch.Tensor = field(default_factory=_no_positions)
    forbidden: torch.Tensor = field(default_factory=_no_positions)
    seed: int | None = None
    resting: Resting | None = None
    start: int = 0

    @property
    def flat(self) -> torch.Tensor:
        """The live weights that this process holds, as a flat view that shares their memory."""
        return self.parameter.data.view(-1)

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        """Live weights at flat indices, [n]."""
        return self.flat[indices]

    def write(self, indices: torch.Tensor, values: torch.Tensor) -> None:
        """Round values [n] to the live dtype and write them."""
        self.flat.index_copy_(0, indices, values.to(self.parameter))

    def restore(self, indices: torch.Tensor, base: torch.Tensor) -> None:
        """Give weights their base bits [n] back."""
        self.write(indices, base)

    def weights(self) -> torch.Tensor:
        """The live weights, flat, to be read only."""
        return self.flat

    def held_weights(self) -> torch.Tensor:
        """Those that this process holds, flat, to be read only."""
        return self.weights()

    def take_gradient(self) -> torch.Tensor | None:
        """The dense gradient of the weights held here, flat, which the parameter then lacks."""
        gradient, self.parameter.grad = self.parameter.grad, None
        return None if gradient is None else gradient.reshape(-1)

    def held(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of flat indices [n] of the whole tensor those of weights held here, counted from the
        first of these, and which they were, bool [n]."""
        return indices, torch.ones(len(indices), dtype=torch.bool)

    def matrix(self, flat: torch.Tensor) -> torch.Tensor:
        """What belongs to the weights held here, [numel], as rows; a vector is one row."""
        return flat.view(self.shape[0] if len(self.shape) > 1 else 1, -1)

    def bounds(self) -> tuple[float, float]:
        """Least and largest |w| of the live weights held here."""
        least, largest = float("inf"), 0.0
        for part in torch.split(self.held_weights(), 2**24):
            if not len(part):
                continue
            size = part.abs()
            least, largest = min(least, size.min().item()), max(largest, size.max().item())
        return least, largest

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return tuple(self.parameter.shape)

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return self.parameter.numel()

    def close(self) -> None:
        """Training is over; the live weights stay."""

    def blocked(self) -> Array:
        """Flat indices that are taken or forbidden, int64, sorted."""
        taken, forbidden = self.indices.cpu().numpy(), self.forbidden.cpu().numpy()
        return np.union1d(taken, forbidden)
