"""N:M masking: N of every M consecutive weights along the input features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from deltakit.dtypes import Array
from deltakit.errors import BudgetError, ConfigError
from deltakit.formats.seeded import philox_words
from deltakit.selection.allocation import seats
from deltakit.selection.methods import (
    METHODS,
    Candidate,
    Chosen,
    Scene,
    Start,
    check_budget,
    refuse_marks,
)
from deltakit.selection.units import ordered, output_axis

PICKS = ("random", "largest", "smallest")


@METHODS.register("n:m", "N of every M consecutive weights", "2:4 sparsity, Mishra et al. 2021")
@dataclass(frozen=True, kw_only=True)
class NMMask:
    """N of M consecutive weights along the input features (Mishra et al. 2021), `budget` in all.

    Groups of M are drawn from `seed`, different for every tensor, and N entries taken in each
    until the budget is reached; a tensor's last group may give fewer. pick: which N of a group,
    "random" (from `seed`) or those of "largest" or "smallest" magnitude. Input features that do
    not fill a group of M, vectors and scalars take no part. Tensors share by size.
    """

    budget: int
    n: int = 2
    m: int = 4
    pick: str = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if not 1 <= self.n <= self.m:
            raise ConfigError(f"n:m needs 1 <= n <= m, found {self.n}:{self.m}")
        if self.pick not in PICKS:
            raise ConfigError(f"unknown pick {self.pick!r}; known: {', '.join(PICKS)}")

    def start(self, scene: Scene) -> Start:
        """The whole support; BudgetError where N of every M are fewer than the budget."""
        refuse_marks(scene, self.budget, "an n:m mask")
        wanted = scene.left(self.budget)
        room = [self._room(target, scene.model) for target in scene.targets]
        if wanted > sum(room):
            raise BudgetError(
                f"budget {self.budget} cannot be met: {self.n} of every {self.m} weights of the "
                f"targets are {sum(room)} entries"
            )
        counts = np.bincount(seats(room, room, wanted), minlength=len(room)).tolist()
        shared = zip(scene.targets, counts, strict=True)
        return Start(support=[self._choose(t, k, scene.model) for t, k in shared if k])

    def _room(self, target: Candidate, model: torch.nn.Module | None) -> int:
        """Entries that a tensor may give at most."""
        whole = int(np.prod(_grid(target, model, self.m)))
        if not whole or not len(target.blocked()):
            return whole * self.n
        return len(self._entries(target, np.arange(whole), model))

    def _choose(self, target: Candidate, count: int, model: torch.nn.Module | None) -> Chosen:
        """`count` entries of a tensor, from as many groups as they need."""
        whole = int(np.prod(_grid(target, model, self.m)))
        groups = ordered(whole, "random", self.seed, target.name, "n:m groups")
        enough = -(-count // self.n) + len(target.blocked())
        entries = self._entries(target, groups[:enough], model)[:count]
        return Chosen(target.number, np.sort(entries))

    def _entries(self, target: Candidate, numbers: Array, model: torch.nn.Module | None) -> Array:
        """The entries that groups of these numbers give, group after group, flat, int64."""
        grid = _grid(target, model, self.m)
        before, group, after = np.unravel_index(numbers, grid)
        stride = grid[2]
        features = target.numel // (grid[0] * stride)
        starts = (before * features + group * self.m) * stride + after
        groups = starts[:, None] + np.arange(self.m) * stride
        blocked = target.blocked()
        free = ~np.isin(groups, blocked) if len(blocked) else np.ones(groups.shape, np.bool_)
        best = np.lexsort((self._rank(target, groups), ~free))[:, : self.n]
        taken = np.take_along_axis(groups, best, 1)
        return np.asarray(taken[np.take_along_axis(free, best, 1)])

    def _rank(self, target: Candidate, groups: Array) -> Array:
        """What the entries of each group are sorted by, least first, [groups, m]."""
        if self.pick == "random":
            words = philox_words(self.seed, target.name, groups.size, "n:m entries")
            return words.reshape(groups.shape)
        at = torch.from_numpy(groups.reshape(-1)).to(target.parameter.device)
        size = target.weights()[at].double().abs().cpu().numpy()
        return np.asarray(size if self.pick == "smallest" else -size).reshape(groups.shape)


def _grid(target: Candidate, model: torch.nn.Module | None, m: int) -> tuple[int, int, int]:
    """Groups of a tensor: elements before the input axis, groups along it, elements after it."""
    if len(target.shape) < 2:
        return 0, 0, 0
    axis = 1 - output_axis(target, model)
    after = int(np.prod(target.shape[axis + 1 :], dtype=np.int64))
    return target.numel // (target.shape[axis] * after), target.shape[axis] // m, after
