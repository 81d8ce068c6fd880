"""What deltas change in a live model, tensor by tensor, without changing anything."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array, add_exact, dtype
from deltakit.errors import BaseMismatchError, CoordinateError, nearest
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import fingerprint, sample_positions
from deltakit.live.arrays import dtype_name, to_numpy, to_torch
from deltakit.live.coordinates import Coordinates, coordinates, find_checkpoint, live_tensors
from deltakit.live.translation import stored_values, to_model
from deltakit.quantized.beside import as_added


@dataclass(frozen=True, eq=False)
class Change:
    """One task's change of one live tensor.

    indices: int64 [n], flat, sorted. difference: float32 [n] (float64 for float64 tensors), of the
    merged weights and the base's as the live dtype rounds them. value: the merged weights [n] in
    the live dtype; where the tensor is quantised, the difference. whole: the tensor that takes the
    live one's place, for extras; then there are no entries.
    """

    indices: torch.Tensor
    difference: torch.Tensor
    value: torch.Tensor
    whole: torch.Tensor | None = None


def changes_of(
    model: torch.nn.Module,
    deltas: Mapping[str, SparseDelta],
    quantised: Mapping[str, tuple[int, ...]],
    base: str | os.PathLike[str] | Checkpoint | None,
    *,
    allow_base_mismatch: bool,
) -> dict[str, dict[int, Change]]:
    """Live name of a tensor -> number of a task, from 1 in the order given -> its change.

    quantised: live name -> shape of the weights that the codes stand for. Raises CoordinateError
    for tensors and shapes that the model lacks, BaseMismatchError for a delta of another base,
    ConfigError for a quantised tensor in set mode without base values.
    """
    live = live_tensors(model)
    where = _coordinates(model, base, deltas, live, quantised)
    changes: dict[str, dict[int, Change]] = defaultdict(dict)
    for number, (task, delta) in enumerate(deltas.items(), 1):
        codes = {n: t for n, t in delta.tensors.items() if where.live.get(n) in quantised}
        for name, tensor in codes.items():
            path = where.live[name]
            _check_shape(task, name, tensor.shape, quantised[path])
            changes[path][number] = _beside_codes(live[path], tensor)
        plain = {name: t for name, t in delta.tensors.items() if name not in codes}
        ours = to_model(plain, where, live)
        if not allow_base_mismatch:
            _check_base(task, delta, plain, where, live)
        for name, parts in ours.items():
            path = where.live[name]
            if any(part.nnz for part in parts):
                changes[path][number] = _change(live[path], parts)
        for name, array in delta.extras.items():
            if name not in where.live:
                raise CoordinateError(
                    f"delta {task!r}: the model has no tensor {name!r}{nearest(name, where.stored)}"
                )
            path = where.live[name]
            _check_shape(task, name, array.shape, quantised.get(path, tuple(live[path].shape)))
            changes[path][number] = _replacement(live[path], array)
    return changes


def _coordinates(
    model: torch.nn.Module,
    base: str | os.PathLike[str] | Checkpoint | None,
    deltas: Mapping[str, SparseDelta],
    live: Collection[str],
    quantised: Collection[str],
) -> Coordinates:
    """Of a quantised model, whose shapes are not the checkpoint's, by the deltas' names alone."""
    if not quantised:
        checkpoint = Checkpoint(os.fspath(base)) if isinstance(base, str | os.PathLike) else base
        return coordinates(model, checkpoint or find_checkpoint(model), buffers=True)
    used = {name for delta in deltas.values() for name in (*delta.tensors, *delta.extras)}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = {}
    for name in live:
        candidates = (name, name.removeprefix(prefix), prefix + name)
        names[name] = next((each for each in candidates if each in used), name)
    return Coordinates(names)


def _change(live: torch.Tensor, parts: Sequence[TensorDelta]) -> Change:
    """The change of a live tensor by deltas of different entries of it, on its device."""
    found = []
    for tensor in parts:
        at = torch.from_numpy(tensor.indices).to(live.device)
        old = to_numpy(live.detach().reshape(-1)[at])
        if tensor.mode == "add":
            new = add_exact(old, [(1.0, tensor.values)])
        else:
            new = tensor.values.view(tensor.kind.numpy).astype(old.dtype, copy=False)
        compute = dtype(dtype_name(live)).compute or np.float64
        difference = new.astype(compute) - old.astype(compute)
        found.append((tensor.indices, difference, new))
    indices, differences, values = (np.concatenate(each) for each in zip(*found, strict=True))
    order = np.argsort(indices, kind="stable")
    arrays = (indices[order], differences[order], values[order])
    return Change(*(to_torch(array).to(live.device) for array in arrays))


def _beside_codes(live: torch.Tensor, tensor: TensorDelta) -> Change:
    """The change of a quantised weight: the delta's own, which no rounding has touched."""
    difference = to_torch(as_added(tensor).values).to(live.device)
    return Change(to_torch(tensor.indices).to(live.device), difference, difference)


def _replacement(live: torch.Tensor, whole: Array) -> Change:
    none = torch.zeros(0, dtype=torch.int64, device=live.device)
    return Change(none, none, none, to_torch(whole).to(live.device, live.dtype))


def _check_base(
    task: str,
    delta: SparseDelta,
    tensors: Mapping[str, TensorDelta],
    where: Coordinates,
    live: Mapping[str, torch.Tensor],
) -> None:
    if delta.base is None:
        return
    for name, tensor in tensors.items():
        recorded = delta.base.tensors.get(name)
        if recorded is None:
            continue
        values = stored_values(name, sample_positions(name, tensor.shape), where, live)
        found = fingerprint(values.astype(dtype(tensor.trained_dtype).numpy), None).sample
        if found != recorded.sample:
            raise BaseMismatchError(
                f"delta {task!r}, tensor {name!r}: it belongs to another base (digest of sampled "
                f"values {recorded.sample}, this model has {found}); allow_base_mismatch=True "
                "overrides"
            )


def _check_shape(task: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise CoordinateError(
            f"delta {task!r}, tensor {name!r}: expected the model's shape {list(expected)}, which "
            f"all tasks of a batch share, found {list(found)}; run the task alone"
        )
