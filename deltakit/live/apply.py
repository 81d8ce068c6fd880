"""Applying deltas to live models, in place, and taking them back bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from deltakit.delta import SparseDelta
from deltakit.errors import ConfigError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.live.adapters import Weighed, check_beside_entries, exchange
from deltakit.live.coordinates import plain_tensors
from deltakit.live.ledger import Applied
from deltakit.live.locator import Locator
from deltakit.live.state import State, state_of
from deltakit.merging.inputs import Given, Input, read_inputs
from deltakit.patching.chain import link_of


@dataclass(eq=False)
class Handle:
    """Deltas applied to a model together; other handles of the model may stand beside it.

    At any time the model holds what merging all applied deltas at once gives, in the order in which
    they were applied; adapters stand beside the weights, as they did in training. Methods are safe from any thread, and wait for forward passes where the model
    has a `dk.guard`.
    """

    _locator: Locator
    _applied: list[Applied] = field(default_factory=list)

    @property
    def deltas(self) -> list[SparseDelta]:
        """What is applied by this handle, in order."""
        return [each.delta for each in self._applied]

    @property
    def weights(self) -> list[float]:
        """The weights of `deltas`."""
        return [each.weight for each in self._applied]

    def set_weights(self, weights: Sequence[float]) -> None:
        """Give the deltas other weights. Raises ConfigError unless there is one for each."""
        inputs = read_inputs(self.deltas, weights)
        pairs = zip(self._applied, inputs, strict=True)
        self._become([a if a.weight == i.weight else replace(a, weight=i.weight) for a, i in pairs])

    def swap(self, position: int, delta: Given, weight: float | None = None) -> None:
        """Put another delta in the place of one; the weight stays unless given."""
        if not 0 <= position < len(self._applied):
            raise ConfigError(
                f"there is no delta {position} to swap: {len(self._applied)} deltas, from 0"
            )
        old = self._applied[position]
        (new,) = read_inputs(delta, [old.weight if weight is None else weight])
        with self._state.changing():
            found = self._locator.locate(new)
            self._become([found if each is old else each for each in self._applied])

    def revert(self) -> None:
        """Take the deltas back; without others the base's very bits are there again.

        A second call does nothing.
        """
        self._become([])

    @property
    def _state(self) -> State:
        return state_of(self._locator.model)

    def _become(self, mine: list[Applied]) -> None:
        with self._state.changing():
            switch(self._locator.model, self._applied, mine)
            self._applied = mine


def switch(model: torch.nn.Module, old: Sequence[Applied], new: Sequence[Applied]) -> None:
    """Let `new` stand where `old` stood among all that is applied to a model."""
    state = state_of(model)
    with state.changing():
        present = state.ledger.applied
        start = next((n for n, a in enumerate(present) if any(a is o for o in old)), len(present))
        others = [not any(each is o for o in old) for each in present]
        before = [a for a, keep in zip(present[:start], others[:start], strict=True) if keep]
        after = [a for a, keep in zip(present[start:], others[start:], strict=True) if keep]
        applied = [*before, *new, *after]
        changes = state.ledger.plan(plain_tensors(model), applied)
        check_beside_entries(applied)
        with state.guard.writing():
            exchange(_adapters(present), _adapters(applied))
            state.ledger.commit(changes, applied)


def _adapters(applied: Sequence[Applied]) -> list[Weighed]:
    return [(each.adapter, each.weight) for each in applied if each.adapter is not None]


def apply(
    model: torch.nn.Module,
    deltas: Given | Sequence[Given],
    weights: Sequence[float] | None = None,
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    allow_base_mismatch: bool = False,
) -> Handle:
    """Add deltas (or `.sdelta` files) to a live model in place, by the arithmetic of merging.

    base: the checkpoint the model was loaded from, found through the model by default; it maps
    live names to the deltas' names. Extras replace the live tensors of their names, whatever the
    weights. Everything is checked before anything is written. Raises CoordinateError for tensors or
    shapes the model lacks, BaseMismatchError for a delta of another base, ConfigError for weights
    that do not fit, DeltaError for extras and `set` entries that differ.

    A delta of an adapter attaches it, so that the model computes what the trained one did, bit for
    bit. Weights other than 1 scale what LoRA, AdaLoRA, LoHa and LoKr add, several of one kind stand
    side by side, and beside entries in the same weights; ConfigError for what does not go together.

    A weight patch (see `deltakit.patching.stream`), or consecutive ones, moves the base itself on,
    where it is the next of its chain; see `deltakit.patching.following.follow`.
    """
    inputs: list[Input] = read_inputs(deltas, weights)
    if any(link_of(each.delta) for each in inputs):
        from deltakit.patching.following import follow  # builds on this module

        return follow(Locator(model, base, allow_base_mismatch), inputs)
    handle = Handle(Locator(model, base, allow_base_mismatch))
    with state_of(model).changing():
        handle._become([handle._locator.locate(each) for each in inputs])
    return handle


@contextmanager
def applied(
    model: torch.nn.Module,
    deltas: Given | Sequence[Given],
    weights: Sequence[float] | None = None,
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    allow_base_mismatch: bool = False,
) -> Iterator[Handle]:
    """`apply` for the length of a with block; the model's very bits are back when it ends."""
    handle = apply(model, deltas, weights, base=base, allow_base_mismatch=allow_base_mismatch)
    try:
        yield handle
    finally:
        handle.revert()
