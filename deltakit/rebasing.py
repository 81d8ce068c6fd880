"""Changing a delta's mode between set and add, given the base, without changing what it does."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np

from deltakit.adapters.refusal import refuse_adapters
from deltakit.delta import Mode, SparseDelta, TensorDelta
from deltakit.differences import proven_differences
from deltakit.dtypes import Array, add_exact
from deltakit.errors import BaseMismatchError, ConfigError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import check_base


def rebase(
    delta: SparseDelta,
    base: str | os.PathLike[str] | Checkpoint,
    mode: Mode,
    *,
    keep_base: bool = True,
) -> SparseDelta:
    """The same delta with its tensors in another mode; merging either into `base` is the same.

    mode: "set" turns differences into the bits that merging writes. "add" turns bits into
    differences v where round(base + v) gives the bits back, entry for entry; a tensor where it does
    not, or whose dtype has no sums (float8, integers, bool), stays set, and the last step of the
    lineage in the provenance names it under "stayed_set".
    keep_base: whether set tensors carry the base's bits, which weights and truncation need.

    Supports, order, extras and the base's identity stay. Raises ConfigError for another mode,
    BaseMismatchError for a checkpoint that is not the delta's base and DeltaError for a delta of an
    adapter.
    """
    if mode not in ("add", "set"):
        raise ConfigError(f"mode {mode!r}: mode is add or set")
    initial = "its values are differences to the adapter's initial ones, which a seed gives"
    refuse_adapters([delta.adapter], "another mode", initial)
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint(os.fspath(base))
    check_base(delta, checkpoint)
    tensors = {}
    for name, tensor in delta.tensors.items():
        if checkpoint.info(name).dtype != tensor.dtype:
            raise BaseMismatchError(
                f"tensor {name!r} is {tensor.dtype} in the delta and "
                f"{checkpoint.info(name).dtype} in {checkpoint.path}; give the base as it was"
            )
        before = checkpoint.gather(name, tensor.indices)
        tensors[name] = _as_set(tensor, before) if mode == "set" else _as_add(tensor, before)
    stayed = [name for name, tensor in tensors.items() if tensor.mode != mode]
    if not keep_base:
        tensors = {name: replace(t, base_values=None) for name, t in tensors.items()}
    step = {"operation": "rebase", "mode": mode} | ({"stayed_set": stayed} if stayed else {})
    lineage = [*delta.provenance.get("lineage", []), step]
    return replace(delta, tensors=tensors, provenance={**delta.provenance, "lineage": lineage})


def _as_set(tensor: TensorDelta, before: Array) -> TensorDelta:
    if tensor.mode == "set":
        return replace(tensor, base_values=before)
    kind = tensor.kind
    with np.errstate(over="ignore", invalid="ignore"):  # too large becomes inf, as in merging
        after = add_exact(before.view(kind.numpy), [(1.0, tensor.values)]).view(kind.words)
    return replace(tensor, mode="set", values=after, base_values=before)


def _as_add(tensor: TensorDelta, before: Array) -> TensorDelta:
    if tensor.mode == "add":
        return tensor
    values = proven_differences(before, tensor.values, tensor.kind)
    if values is None:
        return replace(tensor, base_values=before)
    return replace(tensor, mode="add", values=values, base_values=None)
