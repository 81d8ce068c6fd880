"""Bringing deltas to a live model: where their tensors are in it, and whether it is their base."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from deltakit.adapters.places import Places
from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array, dtype, dtype_of
from deltakit.errors import ConfigError, CoordinateError, nearest
from deltakit.formats.checkpoint import Checkpoint
from deltakit.live.adapters import LiveAdapter
from deltakit.live.arrays import dtype_name
from deltakit.live.base_check import check_live_base
from deltakit.live.coordinates import (
    Coordinates,
    open_base,
    plain_coordinates,
    plain_tensors,
)
from deltakit.live.ledger import Applied
from deltakit.live.offload import check_resident
from deltakit.live.state import state_of
from deltakit.live.translation import read_stored, to_model
from deltakit.merging.inputs import Input
from deltakit.quantized.beside import beside, refuse_whole
from deltakit.quantized.stand_in import StandIn

_Live = Mapping[str, torch.Tensor]


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
        return open_base(self.model, self.base)

    @cached_property
    def where(self) -> Coordinates:
        """Where the checkpoint holds the model's tensors."""
        return plain_coordinates(self.model, self.checkpoint)

    def check_names(self, names: Sequence[str]) -> None:
        """Raise CoordinateError for a tensor of the checkpoint that the model lacks."""
        known = set(self.where.stored)
        for name in names:
            if name not in known:
                raise CoordinateError(
                    f"the model has no tensor {name!r}{nearest(name, self.where.stored)}"
                )

    def locate(self, given: Input) -> Applied:
        """The delta in the model's coordinates, checked against the base that the model holds."""
        live, delta = plain_tensors(self.model), given.delta
        extras = {name: _whole(name, array) for name, array in given.extras.items()}
        tensors = delta.tensors if delta.adapter is None else {}
        found = Applied(
            delta,
            given.weight,
            beside(self._by_live_name(to_model(tensors, self.where, live)), live),
            self._by_live_name(to_model(extras, self.where, live)),
            self._adapter(delta, live),
        )
        refuse_whole(found.extras, live)
        for name in found.names:
            check_resident(name, live[name])
        if not self.allow_base_mismatch:
            based = delta if delta.adapter is None else self._stood_at(delta, live)
            check_live_base(
                self._checkable(based, live),
                lambda name, at: self._base_values(name, at, live),
                self.checkpoint,
            )
        return found

    def _base_values(self, name: str, at: Array, live: _Live) -> Array:
        """What the base holds at flat positions [n] of a tensor, whatever is applied to it."""
        if self._codes(name, live):  # they do not tell their base; its checkpoint does
            assert self.checkpoint is not None
            kind = self.checkpoint.info(name).kind
            return self.checkpoint.gather(name, at).view(kind.numpy)
        ledger = state_of(self.model).ledger

        def read(name: str, at: Array) -> Array:
            kind = dtype(dtype_name(live[name]))
            return ledger.base_words(name, live[name], at).view(kind.numpy)

        return read_stored(name, at, self.where, read)

    def _adapter(self, delta: SparseDelta, live: _Live) -> LiveAdapter | None:
        adapter = delta.adapter
        if adapter is None:
            return None
        places = Places(self.model, self.checkpoint)
        stored = dict.fromkeys(adapter.split(name)[0] for name in delta.tensors)
        modules = [places.live_module(module) for module in stored]
        if any("stored" in rule for rule in adapter.initial.values()):
            whole = [n for n in map(places.base_tensor, modules) if not self._codes(n, live)]
            if whole:
                raise ConfigError(
                    f"adapter {adapter.kind!r} began with what quantising {whole[0]!r} loses, and the "
                    "model holds that in full: quantise the model as in training, or merge the delta"
                )
        return LiveAdapter(self.model, delta, modules, self.checkpoint)

    def _stood_at(self, delta: SparseDelta, live: _Live) -> SparseDelta:
        """A delta without entries of the base's tensors whose fingerprints an adapter delta holds."""
        recorded = {} if delta.base is None else delta.base.tensors
        names = [name for name in recorded if name not in delta.tensors]  # those are initial values
        self.check_names(names)
        tensors = {}
        for name in names:
            tensor = live[self.where.live[name]]
            tensors[name] = TensorDelta(
                name=name,
                shape=tuple(tensor.shape),
                dtype=self.where.dtypes.get(name, dtype_name(tensor)),
                mode="add",
                indices=np.zeros(0, np.int64),
                values=np.zeros(0, np.float32),
            )
        return SparseDelta(tensors=tensors, base=delta.base)

    def _codes(self, name: str, live: _Live) -> bool:
        """Whether a tensor of the checkpoint is quantised in the model."""
        parts = self.where.by_stored.get(name)
        return isinstance(live[parts[0].live if parts else self.where.live[name]], StandIn)

    def _checkable(self, delta: SparseDelta, live: _Live) -> SparseDelta:
        """The delta without quantised tensors where no checkpoint tells their base."""
        if self.checkpoint is not None:
            return delta
        known = {n: t for n, t in delta.tensors.items() if not self._codes(n, live)}
        return replace(delta, tensors=known)

    def _by_live_name(
        self, tensors: Mapping[str, Sequence[TensorDelta]]
    ) -> dict[str, Sequence[TensorDelta]]:
        return {self.where.live[name]: parts for name, parts in tensors.items()}


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
