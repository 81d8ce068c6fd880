"""A run's selector at work: it is handed dense gradients, and what it chooses is carried out."""

from __future__ import annotations

import torch

from deltakit.dtypes import Array
from deltakit.errors import TrainingError
from deltakit.parallel.ranks import Ranks
from deltakit.selection.methods import Change, Selector
from deltakit.training.entries import Entries
from deltakit.training.shard_target import part_of
from deltakit.training.target import Target


class Scoring:
    """Lets a selector change the support of `entries`; to the selector it is the `Support`.

    selector: None for a support that never changes. ranks: of a sharded model, whose entries each
    process chooses from its part of.
    """

    def __init__(
        self, selector: Selector | None, entries: Entries, ranks: Ranks | None = None
    ) -> None:
        self.selector, self._entries = selector, entries
        # Places whose entry was replaced: the optimizer's state there belongs to one that has left.
        self.renewed = torch.zeros(0, dtype=torch.int64, device=entries.base.device)
        self._began = False
        self._offered = [False] * len(entries.targets)
        # Entries that are not chosen keep their base bits, so these stay true.
        self._bounds = [t.bounds() for t in entries.targets] if selector else []
        if selector and ranks:
            selector.split(ranks, [part_of(target) for target in entries.targets])

    def scores(self, step: int) -> bool:
        """Whether the gradients of a step are scored, to change the support."""
        return self.selector is not None and self.selector.scores_step(step)

    def forget(self) -> None:
        """The gradients of a step are done with, or given up."""
        self._began = False
        self._offered = [False] * len(self._offered)

    def claim(self, target: Target, passes: int) -> None:
        """Take note that a tensor's gradient comes; TrainingError for the second in one step."""
        if self._offered[target.number]:
            raise TrainingError(
                f"{target.live_name}: backward ran more often than accumulation_steps={passes} "
                "between two optimizer steps; pass the real number"
            )
        self._offered[target.number] = True

    def offer(self, target: Target, flat: torch.Tensor, step: int) -> None:
        """Let the selector score a tensor's dense gradient, [numel] of what is held here."""
        self._begin(step)
        assert self.selector is not None
        taken = [] if self.selector.competes else [target.indices]
        for indices in (target.forbidden, *taken):
            if len(indices):
                flat.index_fill_(0, indices, 0)
        matrix, weights = target.matrix(flat), target.held_weights()
        bounds = self._bounds[target.number]
        self.selector.offer(target.number, matrix, weights, bounds, target.live_name)

    def choose(self, step: int) -> None:
        """Change the support by what was offered."""
        self._begin(step)
        assert self.selector is not None
        self._exchange(self.selector.choose(self), step)

    def choose_ahead(self, step: int) -> bool:
        """Let the selector change the support before a step's gradients come; whether it did."""
        change = self.selector.ahead(step, self) if self.selector else None
        if change is not None:
            self._exchange(self._held(change), step)
        return change is not None

    def indices(self, number: int) -> torch.Tensor:
        """Flat indices of one tensor's entries in training, int64 [n]."""
        return self._entries.targets[number].indices

    def values(self, number: int) -> torch.Tensor:
        """Their values, in the same order, [n]."""
        return self._entries.values.detach()[self._entries.targets[number].slots]

    def blocked(self, number: int) -> Array:
        """Flat indices that are taken or must not be chosen, int64, sorted."""
        return self._entries.targets[number].blocked()

    def forbidden(self, number: int) -> Array:
        """Flat indices that must not be chosen, int64, sorted; those taken may be."""
        return self._entries.targets[number].forbidden.cpu().numpy()

    def _begin(self, step: int) -> None:
        if not self._began:
            assert self.selector is not None
            if self.selector.competes:  # entries in training move, and with them the bounds
                self._bounds = [target.bounds() for target in self._entries.targets]
            self.selector.begin(step, self)
            self._began = True

    def _held(self, change: Change) -> Change:
        """The part of a change, told in whole tensors, that concerns the weights held here."""
        joining = []
        for number, indices, gradients in change.joining:
            here, mine = self._entries.targets[number].held(indices)
            joining.append((number, here, gradients[mine]))
        assert not change.leaving, "none leaves by a choice made without gradients"
        return Change(joining=joining)

    def _exchange(self, change: Change, step: int) -> None:
        assert self.selector is not None
        slots = self._entries.exchange(change, step, restore=self.selector.restores)
        self.renewed = torch.cat([self.renewed, slots])
