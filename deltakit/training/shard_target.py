"""Targets of which this process holds some rows only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltakit.parallel.shards import Shards, held_here, whole
from deltakit.selection.methods import Part
from deltakit.training.target import Target


@dataclass(eq=False)
class ShardTarget(Target):
    """A parameter that FSDP2 has split; shape and numel are the whole tensor's.

    In training its indices are local to the rows held here; before, while a method looks at whole
    tensors, nothing is."""

    @property
    def flat(self) -> torch.Tensor:
        """The live weights held here, a flat view that shares their memory."""
        return held_here(self.parameter).view(-1)

    def weights(self) -> torch.Tensor:
        """All live weights, flat: a collective, for methods that look at one tensor at a time."""
        return whole(self.parameter).view(-1)

    def held_weights(self) -> torch.Tensor:
        """Those held here, flat."""
        return self.flat

    def take_gradient(self) -> torch.Tensor | None:
        """The dense gradient of the rows held here, flat; FSDP has averaged it over processes."""
        gradient, self.parameter.grad = self.parameter.grad, None
        return None if gradient is None else held_here(gradient).view(-1)

    def held(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of flat indices [n] of the whole tensor that are here; see `Target.held`."""
        local = indices - self.start
        mine = (local >= 0) & (local < self.flat.numel())
        return local[mine], mine

    def matrix(self, flat: torch.Tensor) -> torch.Tensor:
        """What belongs to the weights held here, [numel here], as rows; a vector is one row."""
        if len(self.shape) == 1:
            return flat.view(1, -1)
        return flat.view(-1, self.numel // self.shape[0])


def part_of(target: Target) -> Part:
    """The part of a tensor that this process holds, as a selector takes it."""
    return Part(target.flat.numel(), len(target.shape) == 1 or target.shape[0] == 1)


def split_targets(targets: Sequence[Target], shards: Shards) -> list[Target]:
    """The same targets as this process holds them, none of whose entries is in training yet."""
    found: list[Target] = []
    for target in targets:
        start = shards.start(target.parameter)
        mine = ShardTarget(
            target.number, target.name, target.live_name, target.parameter, start=start
        )
        mine.forbidden = mine.held(target.forbidden)[0]
        found.append(mine)
    return found
