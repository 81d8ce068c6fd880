"""Applying deltas to live models, in place, and taking them back bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array, dtype, dtype_of
from deltakit.errors import ConfigError, CoordinateError, nearest
from deltakit.formats.checkpoint import Checkpoint
from deltakit.live.arrays import dtype_name
from deltakit.live.base_check import check_live_base
from deltakit.live.coordinates import Coordinates, coordinates, find_checkpoint, live_tensors
from deltakit.live.ledger import Applied
from deltakit.live.offload import check_resident
from deltakit.live.state import State, state_of
from deltakit.live.translation import read_stored, to_model
from deltakit.merging.inputs import Given, Input, read_inputs
from deltakit.patching.chain import link_of
from deltakit.quantized.beside import beside, refuse_whole
from deltakit.quantized.stand_in import StandIn


@dataclass(frozen=True, eq=False)
class Locator:
    """Brings deltas to a model: finds their tensors in it and checks that it is their base.

    Raises CoordinateError for tensors or shapes that the model lacks, and for weights that are in
    no memory; BaseMismatchError for a delta of another base.
    """

    model: torch.nn.Module
    base: str | os.PathLike[str] | Checkpoint | None
    allow_base_mismatch: bool

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint that maps live names to the deltas' names."""
        if self.base is None or isinstance(self.base, Checkpoint):
            return self.base or find_checkpoint(self.model)
        return Checkpoint(os.fspath(self.base))

    @cached_property
    def where(self) -> Coordinates:
        """Where the checkpoint holds the model's tensors."""
        return coordinates(self.model, self.checkpoint, buffers=True)

    def check_names(self, names: Sequence[str]) -> None:
        """Raise CoordinateError for a tensor of the checkpoint that the model lacks."""
        known = set(self.where.stored)
        for name in names:
            if name not in known:
                raise CoordinateError(
                    f"the model has no tensor {name!r}{nearest(name, self.where.stored)}"
                )

    def locate(self, delta: SparseDelta, weight: float) -> Applied:
        """The delta in the model's coordinates, checked against the base that the model holds."""
        live = live_tensors(self.model)
        extras = {name: _whole(name, array) for name, array in delta.extras.items()}
        found = Applied(
            delta,
            weight,
            beside(self._by_live_name(to_model(delta.tensors, self.where, live)), live),
            self._by_live_name(to_model(extras, self.where, live)),
        )
        refuse_whole(found.extras, live)
        for name in found.names:
            check_resident(name, live[name])
        if not self.allow_base_mismatch:
            ledger = state_of(self.model).ledger

            def read(name: str, at: Array) -> Array:
                kind = dtype(dtype_name(live[name]))
                return ledger.base_words(name, live[name], at).view(kind.numpy)

            def base_values(name: str, at: Array) -> Array:
                if self._codes(name, live):  # they do not tell their base; its checkpoint does
                    assert self.checkpoint is not None
                    kind = self.checkpoint.info(name).kind
                    return self.checkpoint.gather(name, at).view(kind.numpy)
                return read_stored(name, at, self.where, read)

            check_live_base(self._checkable(delta, live), base_values, self.checkpoint)
        return found

    def _codes(self, name: str, live: Mapping[str, torch.Tensor]) -> bool:
        """Whether a tensor of the checkpoint is quantised in the model."""
        parts = self.where.by_stored.get(name)
        return isinstance(live[parts[0].live if parts else self.where.live[name]], StandIn)

    def _checkable(self, delta: SparseDelta, live: Mapping[str, torch.Tensor]) -> SparseDelta:
        """The delta without quantised tensors where no checkpoint tells their base."""
        if self.checkpoint is not None:
            return delta
        known = {n: t for n, t in delta.tensors.items() if not self._codes(n, live)}
        return replace(delta, tensors=known)

    def _by_live_name(
        self, tensors: Mapping[str, Sequence[TensorDelta]]
    ) -> dict[str, Sequence[TensorDelta]]:
        return {self.where.live[name]: parts for name, parts in tensors.items()}


@dataclass(eq=False)
class Handle:
    """Deltas applied to a model together; other handles of the model may stand beside it.

    At any time the model holds what merging all applied deltas at once gives, in the order in which
    they were applied. Methods are safe from any thread, and wait for forward passes where the model
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
            found = self._locator.locate(new.delta, new.weight)
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
        changes = state.ledger.plan(live_tensors(model), applied)
        with state.guard.writing():
            state.ledger.commit(changes, applied)


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

    A weight patch (see `deltakit.patching.stream`), or consecutive ones, moves the base itself on,
    where it is the next of its chain; see `deltakit.patching.following.follow`.
    """
    inputs: list[Input] = read_inputs(deltas, weights)
    if any(link_of(each.delta) for each in inputs):
        from deltakit.patching.following import follow  # builds on this module

        return follow(Locator(model, base, allow_base_mismatch), inputs)
    handle = Handle(Locator(model, base, allow_base_mismatch))
    with state_of(model).changing():
        handle._become([handle._locator.locate(each.delta, each.weight) for each in inputs])
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


def _whole(name: str, array: Array) -> TensorDelta:
    """An extra as entries that set all of a tensor."""
    return TensorDelta(
        name=name,
        shape=array.shape,
        dtype=dtype_of(array).name,
        mode="set",
        indices=np.arange(array.size),
        values=array.reshape(-1),
    )
