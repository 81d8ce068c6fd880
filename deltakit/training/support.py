"""Where a run's support comes from before its first step: earlier deltas and the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array
from deltakit.errors import ConfigError, CoordinateError, nearest
from deltakit.live.arrays import to_torch
from deltakit.selection.methods import Chosen, Scene
from deltakit.training.entries import Entries
from deltakit.training.extra import Extra
from deltakit.training.target import Target


def keep_clear(targets: Sequence[Target], avoid: Sequence[SparseDelta]) -> None:
    """Forbid the supports of other deltas; tensors that are no targets cannot collide."""
    for target in targets:
        supports = [target.forbidden.cpu().numpy()]
        for delta in avoid:
            if target.name in delta.tensors:
                tensor = delta.tensors[target.name]
                _check_shape(target, tensor)
                supports.append(tensor.indices)
        if len(supports) > 1:
            together = np.unique(np.concatenate(supports))
            target.forbidden = torch.from_numpy(together).to(target.parameter.device)


def continued(scene: Scene, targets: Sequence[Target], delta: SparseDelta | None) -> Scene:
    """The scene as it will be once `continue_from` has taken the delta's entries."""
    if delta is None:
        return scene
    taken = {n: torch.from_numpy(tensor.indices) for n, tensor in delta.tensors.items()}
    ahead = [replace(t, indices=taken.get(t.name, t.indices)) for t in targets]
    return replace(scene, targets=ahead, taken=delta.nnz)


def continue_from(delta: SparseDelta, entries: Entries, extras: Sequence[Extra]) -> None:
    """Take an earlier delta's entries into training, with its values, and its extras.

    Raises CoordinateError for tensors that are no targets of this run and ConfigError for `set`
    deltas, forbidden entries and a budget that is smaller than the delta.
    """
    targets = {t.name: t for t in entries.targets}
    if delta.nnz > entries.budget:
        raise ConfigError(
            f"the delta to continue from holds {delta.nnz} entries, more than the budget "
            f"{entries.budget}; truncate it or raise the budget"
        )
    before, orders = _orders(delta), []
    for name, tensor in delta.tensors.items():
        if name not in targets:
            raise CoordinateError(
                f"the delta to continue from changes {name!r}, which is no target of this run"
                f"{nearest(name, list(targets))}"
            )
        _check_shape(targets[name], tensor)
        if tensor.mode != "add":
            raise ConfigError(f"tensor {name!r} is in set mode; continue from add deltas only")
        if np.isin(tensor.indices, targets[name].forbidden.cpu().numpy()).any():
            raise ConfigError(f"tensor {name!r}: entries to continue from are also to be avoided")
        indices, mine = targets[name].held(torch.from_numpy(tensor.indices))
        entries.add(targets[name], indices, 0, values=torch.from_numpy(tensor.values)[mine])
        orders.append(before[name][mine.numpy()])
    steps = max((int(order.max()) + 1 for order in before.values() if len(order)), default=0)
    entries.remember_initial(orders, steps)
    kept = {e.name: e for e in extras}
    for name, array in delta.extras.items():
        if name in kept:
            kept[name].take(to_torch(array))


def enter(support: Sequence[Chosen], entries: Entries) -> None:
    """Take a support that a method chose before training into training."""
    for chosen in support:
        target = entries.targets[chosen.number]
        target.seed = None if len(target.indices) else chosen.seed
        indices, mine = target.held(torch.from_numpy(chosen.indices))
        values = None if chosen.values is None else chosen.values[mine.to(chosen.values.device)]
        entries.add(target, indices, 0, values=values)


def _orders(delta: SparseDelta) -> dict[str, Array]:
    """The recorded orders by tensor; zeros where not all tensors have theirs."""
    tensors = delta.tensors
    known = {name: tensor.order for name, tensor in tensors.items() if tensor.order is not None}
    if len(known) == len(tensors):
        return known
    return {name: np.zeros(tensor.nnz, np.int64) for name, tensor in tensors.items()}


def _check_shape(target: Target, tensor: TensorDelta) -> None:
    if tuple(target.parameter.shape) != tensor.shape:
        raise CoordinateError(
            f"tensor {tensor.name!r}: the delta has shape {list(tensor.shape)}, the model "
            f"{list(target.parameter.shape)}"
        )
