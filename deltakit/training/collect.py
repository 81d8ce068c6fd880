"""From compact arrays in order of unmasking to the tensors of a delta, sorted by index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from deltakit.delta import TensorDelta
from deltakit.dtypes import Array, dtype
from deltakit.live.arrays import dtype_name, to_numpy
from deltakit.live.coordinates import Coordinates
from deltakit.live.translation import to_checkpoint
from deltakit.parallel.shards import Shards
from deltakit.quantized.stand_in import StandIn
from deltakit.training.entries import Entries
from deltakit.training.target import Target


def collect(
    entries: Entries,
    where: Coordinates,
    *,
    ordered: bool,
    frozen: bool,
    shards: Shards | None = None,
    everywhere: bool = True,
) -> tuple[dict[str, TensorDelta], dict[str, Array]]:
    """The tensors of a delta by name in the checkpoint, and the base's values at their indices.

    A quantised tensor counts as trained in the dtype of the full-precision checkpoint, and its
    base values are left out, since no code tells them.
    ordered: whether orders are recorded. frozen: entries were zeroed rather than trained, so they
    are in `set` mode. shards: the processes of which each has entries of its own; all get the
    entries of all, or the first alone where they are not wanted `everywhere`.
    """
    orders = entries.recorded_order() if ordered else None
    tensors: dict[str, TensorDelta] = {}
    base: dict[str, Array] = {}
    for target in entries.targets:
        found, seed = _sorted(target, entries, orders), target.seed
        if shards is not None:
            found, seed = _joined(shards, target, found, everywhere)
        indices, values, before, order = found
        if len(indices):
            on_disk = where.dtypes.get(target.name)
            live = dtype_name(target.parameter)
            if isinstance(target.parameter, StandIn):
                live = on_disk or live
            else:
                base[target.name] = to_numpy(before.to(target.parameter.dtype))
            if frozen:
                tensors[target.name] = _zeroed(target, on_disk, indices, base[target.name])
            else:
                tensors[target.name] = TensorDelta(
                    name=target.name,
                    shape=target.shape,
                    dtype=on_disk or live,
                    mode="add",
                    indices=indices,
                    values=values.numpy(),
                    order=order,
                    trained_dtype=live,
                    seed=seed,
                )
    return to_checkpoint(tensors, where), _base_in_checkpoint(entries.targets, tensors, base, where)


def _base_in_checkpoint(
    targets: Sequence[Target],
    tensors: Mapping[str, TensorDelta],
    base: Mapping[str, Array],
    where: Coordinates,
) -> dict[str, Array]:
    """Base values at the indices of `tensors`, in the order of the indices in the checkpoint."""
    bits = {
        target.name: TensorDelta(
            name=target.name,
            shape=target.shape,
            dtype=dtype_name(target.parameter),
            mode="set",
            indices=tensors[target.name].indices,
            values=base[target.name],
        )
        for target in targets
        if target.name in base and target.name in where.regions
    }
    moved = {n: t.values.view(t.kind.numpy) for n, t in to_checkpoint(bits, where).items()}
    return {name: values for name, values in base.items() if name not in bits} | moved


# Indices, values, base values and orders of a tensor's entries, sorted by index.
_Found = tuple[Array, torch.Tensor, torch.Tensor, Array | None]


def _joined(
    shards: Shards, target: Target, mine: _Found, everywhere: bool
) -> tuple[_Found, int | None]:
    """The entries of all processes, whose parts of a tensor follow one another, and the seed."""
    device = target.parameter.device
    indices, values, base, order = mine
    seeded = torch.tensor([target.seed is not None], device=device)
    arrays = [torch.from_numpy(indices + target.start), values, base, seeded]
    arrays += [] if order is None else [torch.from_numpy(order)]
    parts = [array.to(device) for array in arrays]
    found = [joined.cpu() for joined in shards.joined(parts, everywhere=everywhere)]
    orders = None if order is None else found[4].numpy()
    seed = target.seed if found[3].all() else None
    return (found[0].numpy(), found[1], found[2], orders), seed


def _sorted(target: Target, entries: Entries, orders: Array | None) -> _Found:
    """The entries of a tensor, resting ones included."""
    indices, values = target.indices, entries.values.detach()[target.slots]
    base = entries.base[target.slots]
    order = None if orders is None else orders[target.slots.cpu().numpy()]
    if target.resting:
        rest = target.resting
        indices = torch.cat([indices, rest.indices])
        values, base = torch.cat([values, rest.values]), torch.cat([base, rest.base])
        if order is not None:
            order = np.concatenate([order, rest.order.cpu().numpy().astype(np.int64)])
    sort = torch.argsort(indices)
    rows = sort.cpu()
    sorted_order = None if order is None else order[rows.numpy()]
    return indices[sort].cpu().numpy(), values[sort].cpu(), base[sort], sorted_order


def _zeroed(target: Target, on_disk: str | None, indices: Array, base: Array) -> TensorDelta:
    """Entries whose weight is zero; the base's bits are kept where live and stored dtypes agree."""
    live = dtype_name(target.parameter)
    stored = on_disk or live
    width = dtype(stored).numpy.itemsize
    return TensorDelta(
        name=target.name,
        shape=target.shape,
        dtype=stored,
        mode="set",
        indices=indices,
        values=np.zeros(len(indices), f"u{width}"),
        base_values=base.view(f"u{width}") if stored == live else None,
        trained_dtype=live,
    )
