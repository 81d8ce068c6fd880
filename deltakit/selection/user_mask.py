"""Masks from outside: another delta's support, boolean tensors, or a function."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deltakit.delta import SparseDelta
from deltakit.dtypes import Array
from deltakit.errors import BudgetError, ConfigError, CoordinateError, nearest
from deltakit.formats.sdelta import load
from deltakit.selection.fixed import FixedSupport
from deltakit.selection.methods import METHODS, Candidate, Chosen, Scene

MaskFunction = Callable[[str, torch.Tensor], Any]


@METHODS.register("mask", "the support of a delta, or a mask of your own")
@dataclass(frozen=True, kw_only=True)
class UserMask:
    """A support given from outside, fixed before training.

    mask: a delta or the path of a `.sdelta` file, whose entries are taken; boolean tensors by
    name (of the checkpoint or the live model), in the shape of the weights; or a function (name,
    weights) -> boolean tensor, flat indices in any order, or None for no entries, asked for every
    target. budget: the number of entries expected, those of a delta that training continues from
    included; the support's own size by default.
    """

    mask: str | os.PathLike[str] | SparseDelta | Mapping[str, Any] | MaskFunction
    budget: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.mask, (str, os.PathLike)):
            object.__setattr__(self, "mask", load(self.mask))

    def resolve(self, scene: Scene) -> FixedSupport:
        """The support found; BudgetError where it is empty or of another size than `budget`.

        Raises CoordinateError for names that are no targets and shapes that differ, ConfigError for
        indices out of range, repeated, or in entries that are taken or must not be chosen.
        """
        support = self.mask
        assert not isinstance(support, (str, os.PathLike))  # read when the method was made
        if isinstance(support, SparseDelta):
            chosen = _of_delta(support, scene)
        elif isinstance(support, Mapping):
            chosen = _of_masks(support, scene)
        else:
            made = (
                (target, support(target.name, target.weights().view(target.shape)))
                for target in scene.targets
            )
            chosen = [Chosen(t.number, _indices(t, mask)) for t, mask in made if mask is not None]
        chosen = [c for c in chosen if len(c.indices)]
        targets = {target.number: target for target in scene.targets}
        for found in chosen:
            _check_free(targets[found.number], found.indices)
        size = scene.taken + sum(len(c.indices) for c in chosen)
        if not chosen or (self.budget is not None and size != self.budget):
            raise BudgetError(
                f"the mask makes {size} entries, expected "
                f"{self.budget if self.budget is not None and size else 'at least one'}; "
                "give that number as the budget, or another mask"
            )
        return FixedSupport(budget=size, support=sorted(chosen, key=lambda c: c.number))


def _of_delta(delta: SparseDelta, scene: Scene) -> list[Chosen]:
    targets = _named(scene, delta.tensors)
    chosen = []
    for name, tensor in delta.tensors.items():
        _check_shape(targets[name], tensor.shape)
        chosen.append(Chosen(targets[name].number, tensor.indices, tensor.seed))
    return chosen


def _of_masks(masks: Mapping[str, Any], scene: Scene) -> list[Chosen]:
    targets = _named(scene, masks)
    numbers = [targets[name].number for name in masks]
    if len(set(numbers)) != len(numbers):
        raise ConfigError("two masks are for the same tensor, once by its live name; keep one")
    return [Chosen(targets[n].number, _indices(targets[n], mask)) for n, mask in masks.items()]


def _named(scene: Scene, names: Mapping[str, Any]) -> dict[str, Candidate]:
    targets = {t.live_name: t for t in scene.targets} | {t.name: t for t in scene.targets}
    for name in names:
        if name not in targets:
            raise CoordinateError(
                f"the mask holds {name!r}, which is no target of this run"
                f"{nearest(name, list(targets))}"
            )
    return targets


def _indices(target: Candidate, mask: Any) -> Array:
    """Flat indices of a boolean mask, or the indices given, int64, sorted."""
    array = np.asarray(mask.detach().cpu() if isinstance(mask, torch.Tensor) else mask)
    if array.dtype == np.bool_:
        _check_shape(target, array.shape)
        return np.flatnonzero(array)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(
            f"tensor {target.name!r}: a mask must be boolean or hold flat indices, found "
            f"{array.dtype}"
        )
    indices = np.sort(array.reshape(-1).astype(np.int64))
    if len(indices) and (indices[0] < 0 or indices[-1] >= target.numel):
        raise ConfigError(
            f"tensor {target.name!r}: indices of the mask must lie in 0..{target.numel - 1}, found "
            f"{indices[0]} to {indices[-1]}"
        )
    if (np.diff(indices) == 0).any():
        raise ConfigError(f"tensor {target.name!r}: the mask repeats an index")
    return indices


def _check_shape(target: Candidate, shape: tuple[int, ...]) -> None:
    if tuple(shape) != target.shape:
        raise CoordinateError(
            f"tensor {target.name!r}: the mask has shape {list(shape)}, the weights "
            f"{list(target.shape)}"
        )


def _check_free(target: Candidate, indices: Array) -> None:
    clash = int(np.isin(indices, target.blocked(), assume_unique=True).sum())
    if clash:
        raise ConfigError(
            f"tensor {target.name!r}: {clash} entries of the mask are taken already, to be "
            "avoided or outside the targets; take them out of the mask"
        )
