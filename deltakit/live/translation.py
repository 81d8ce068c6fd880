"""Deltas in the checkpoint's coordinates, and the same in the model's.

In the model's coordinates a tensor that the checkpoint holds rearranged goes by its live name, its
live shape and its live flat indices; all other tensors are the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array
from deltakit.errors import CoordinateError, DeltaError, nearest
from deltakit.live.arrays import to_numpy
from deltakit.live.coordinates import Coordinates
from deltakit.parallel.shards import picked


def to_model(
    tensors: Mapping[str, TensorDelta],
    where: Coordinates,
    live: Mapping[str, torch.Tensor],
) -> dict[str, list[TensorDelta]]:
    """Tensors of a delta by name in `where.names`, in the model's coordinates.

    Of a rearranged tensor there is one tensor delta per mode and dtype among its parts. live: the
    model's tensors by live name. Raises CoordinateError for names and shapes that the model lacks,
    DeltaError where the copies of a tied tensor get different entries.
    """
    found: dict[str, list[TensorDelta]] = {}
    parts: dict[str, list[TensorDelta]] = {}
    for name, tensor in tensors.items():
        if name in where.by_stored:
            _check_shape(tensor, where.by_stored[name][0].stored_shape)
            covered = 0
            for region in where.by_stored[name]:
                kept, indices = region.to_live(tensor.indices)
                covered += len(kept)
                shape = tuple(live[region.live].shape)
                parts.setdefault(region.live, []).append(
                    _moved(tensor, kept, indices, region.live, shape)
                )
            if covered < tensor.nnz:
                raise CoordinateError(f"tensor {name!r} has entries in a part the model lacks")
        elif name in where.live and name not in where.regions:
            _check_shape(tensor, tuple(live[where.live[name]].shape))
            found[name] = [tensor]
        else:
            raise CoordinateError(f"the model has no tensor {name!r}{nearest(name, where.stored)}")
    return found | {name: _joined(given) for name, given in parts.items()}


def to_checkpoint(tensors: Mapping[str, TensorDelta], where: Coordinates) -> dict[str, TensorDelta]:
    """Tensors in the model's coordinates, of one mode and dtype each, in the checkpoint's.

    Entries of a tied tensor that the checkpoint holds twice appear twice.
    """
    found: dict[str, TensorDelta] = {}
    parts: dict[str, list[TensorDelta]] = {}
    for name, tensor in tensors.items():
        if name not in where.regions:
            found[name] = tensor
            continue
        covered = np.zeros(tensor.nnz, bool)
        for region in where.regions[name]:
            kept, indices = region.to_stored(tensor.indices)
            covered[kept] = True
            if len(kept):
                parts.setdefault(region.stored, []).append(
                    _moved(tensor, kept, indices, region.stored, region.stored_shape)
                )
        if not covered.all():
            raise CoordinateError(f"tensor {name!r} has entries in a part the checkpoint lacks")
    for name, given in parts.items():
        (found[name],) = _joined(given)
    return found


def settled(
    delta: SparseDelta, where: Coordinates, live: Mapping[str, torch.Tensor]
) -> SparseDelta:
    """A delta whose rearranged tensors are in the model's coordinates; the others as they are.

    Raises DeltaError when the parts of such a tensor are of several modes or dtypes.
    """
    ours = {name: t for name, t in delta.tensors.items() if name in where.by_stored}
    found = {name: t for name, t in delta.tensors.items() if name not in ours}
    for name, parts in to_model(ours, where, live).items():
        if len(parts) > 1:
            raise DeltaError(f"the parts of tensor {name!r} differ in mode or dtype")
        found[name] = parts[0]
    return replace(delta, tensors=found)


def stored_values(
    name: str, positions: Array, where: Coordinates, live: Mapping[str, torch.Tensor]
) -> Array:
    """What the model holds at flat positions [n], sorted, of a tensor of the checkpoint.

    A NumPy array [n] of the live tensor's dtype.
    """
    return read_stored(name, positions, where, lambda name, at: _gather(live[name], at))


def read_stored(
    name: str, positions: Array, where: Coordinates, read: Callable[[str, Array], Array]
) -> Array:
    """`stored_values` of a model whose tensors are read by `read`: live name, indices -> values."""
    if name not in where.by_stored:
        return read(where.live[name], positions)
    kept, values = [], []
    for region in where.by_stored[name]:
        part, indices = region.to_live(positions)
        kept.append(part)
        values.append(read(region.live, indices))
    return np.concatenate(values)[np.argsort(np.concatenate(kept), kind="stable")]


def _gather(tensor: torch.Tensor, positions: Array) -> Array:
    return to_numpy(picked(tensor, torch.from_numpy(positions)))


def _check_shape(tensor: TensorDelta, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CoordinateError(
            f"tensor {tensor.name!r}: the delta has shape {list(tensor.shape)}, the model "
            f"{list(shape)}"
        )


def _moved(
    tensor: TensorDelta, kept: Array, indices: Array, name: str, shape: tuple[int, ...]
) -> TensorDelta:
    """Entries at positions `kept` of a tensor as entries `indices` [n] of another."""
    part = tensor.take(kept)
    order = np.argsort(indices, kind="stable")
    return replace(
        part,
        name=name,
        shape=shape,
        indices=indices[order],
        values=part.values[order],
        order=None if part.order is None else part.order[order],
        base_values=None if part.base_values is None else part.base_values[order],
    )


def _joined(parts: Sequence[TensorDelta]) -> list[TensorDelta]:
    """Entries of parts of one tensor as one tensor delta per mode and dtype."""
    kinds: dict[tuple[object, ...], list[TensorDelta]] = {}
    for part in parts:
        whole = (part.order is None, part.base_values is None)
        kinds.setdefault((part.mode, part.dtype, part.trained_dtype, *whole), []).append(part)
    return [_concatenated(same) for same in kinds.values()]


def _concatenated(parts: Sequence[TensorDelta]) -> TensorDelta:
    first = parts[0]
    if len(parts) == 1:
        return first
    indices = np.concatenate([part.indices for part in parts])
    sort = np.argsort(indices, kind="stable")
    indices = indices[sort]
    again = np.concatenate([[False], indices[1:] == indices[:-1]])

    def merged(arrays: Sequence[Array | None]) -> Array | None:
        given = [array for array in arrays if array is not None]
        return np.concatenate(given)[sort][~again] if given else None

    values = np.concatenate([part.values for part in parts])[sort]
    words = values.view(f"u{values.itemsize}")
    if (words[1:] != words[:-1])[again[1:]].any():
        raise DeltaError(
            f"tensor {first.name!r}: the checkpoint's copies of it get different entries, but the "
            "model ties them"
        )
    return replace(
        first,
        indices=indices[~again],
        values=values[~again],
        order=merged([part.order for part in parts]),
        base_values=merged([part.base_values for part in parts]),
    )
