"""Entries that left the support without going back to the base: changed, and no longer trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Resting:
    """One tensor's resting entries: flat indices int64 [n] (any order), base and values [n] in the
    dtype of the compact arrays, and the step at which each was unmasked, int32 [n]."""

    indices: torch.Tensor
    base: torch.Tensor
    values: torch.Tensor
    order: torch.Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def put(
        self,
        indices: torch.Tensor,
        base: torch.Tensor,
        values: torch.Tensor,
        order: torch.Tensor,
    ) -> None:
        """Lay entries to rest; none of them rests already."""
        self.indices = torch.cat([self.indices, indices])
        self.base = torch.cat([self.base, base])
        self.values = torch.cat([self.values, values])
        self.order = torch.cat([self.order, order])

    def take(self, indices: torch.Tensor, base: torch.Tensor, values: torch.Tensor) -> None:
        """Wake those of the given entries that rest: write their base and values in place."""
        if not len(self):
            return
        ordered, where = self.indices.sort()
        at = torch.searchsorted(ordered, indices).clamp(max=len(ordered) - 1)
        found = ordered[at] == indices
        rows = where[at[found]]
        base[found], values[found] = self.base[rows], self.values[rows]
        stay = torch.ones(len(self), dtype=torch.bool, device=self.indices.device)
        stay[rows] = False
        self.indices, self.base = self.indices[stay], self.base[stay]
        self.values, self.order = self.values[stay], self.order[stay]

    def state(self) -> tuple[torch.Tensor, ...]:
        """Copies of the four arrays, for `state_dict`."""
        arrays = (self.indices, self.base, self.values, self.order)
        return tuple(array.clone() for array in arrays)
