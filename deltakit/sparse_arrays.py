"""Deltas as the sparse arrays of other libraries, and back: SciPy, torch, vLLM's patches.

SciPy's and torch's arrays hold differences, so a `set` tensor needs the base's values beside it;
vLLM's patches hold new weights, so an `add` tensor needs the base.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltakit.adapters.refusal import refuse_adapters
from deltakit.delta import SparseDelta, TensorDelta
from deltakit.differences import changes_of
from deltakit.dtypes import Array, dtype
from deltakit.errors import BaseMismatchError, ConfigError, DeltaError
from deltakit.formats.bridges.bridge import needed
from deltakit.formats.bridges.coo_safetensors import typed_values
from deltakit.formats.bridges.entries import flattened, in_order
from deltakit.formats.bridges.vllm_patch import check_patch
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import identify
from deltakit.rebasing import rebase

if TYPE_CHECKING:
    import torch

_WHOLE = "deltakit merge folds them into the base, delta.tensors holds their own entries"
_EXPORT = "deltakit merge folds them into the base, deltakit convert exports the adapter itself"

Base = str | os.PathLike[str] | Checkpoint


class WeightPatch(NamedTuple):
    """The fields of vLLM's CheckpointWeightPatch, in its order: `CheckpointWeightPatch(*patch)`.

    name: of the checkpoint's tensor. shape, dtype: the checkpoint's (a torch.dtype). values: the
    new weights, [nnz]. indices: flat, sorted, int32 [nnz], int64 for more than 2^31 weights.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor


def to_scipy(delta: SparseDelta) -> dict[str, Any]:
    """Name -> scipy.sparse.coo_array of differences, float32 (float64 for float64 tensors), in
    canonical form; entries of zero stay.

    Extras are not in it. Raises ConfigError for tensors of other than two dimensions where the
    installed SciPy does not hold them (one: from 1.13, more: from 1.15; none: never), DeltaError
    for a `set` tensor without base values.
    """
    refuse_adapters([delta.adapter], "an array of differences by tensor of the base", _WHOLE)
    import scipy
    from scipy.sparse import coo_array

    version = tuple(int(part) for part in scipy.__version__.split(".")[:2])
    arrays = {}
    for name, tensor in delta.tensors.items():
        dims = len(tensor.shape)
        if dims == 0 or (dims == 1 and version < (1, 13)) or (dims > 2 and version < (1, 15)):
            raise ConfigError(
                f"tensor {name!r} has {dims} dimensions, which scipy {scipy.__version__} has no "
                "sparse arrays for; leave it out (dk.restrict)"
            )
        parts: Any = (_differences(tensor), _coordinates(tensor))  # SciPy's stubs know 1-D and 2-D
        array: Any = coo_array(parts, shape=tensor.shape)
        array.has_canonical_format = True
        arrays[name] = array
    return arrays


def from_scipy(
    arrays: Mapping[str, Any],
    *,
    dtypes: str | Mapping[str, str] = "float32",
    base: Base | None = None,
) -> SparseDelta:
    """The delta of differences in SciPy sparse arrays or matrices of any layout.

    dtypes: the base tensors' dtypes, one for all or by name; where `base` is given it tells them,
    and the shapes are checked and its identity recorded. Raises DeltakitError for an index that
    stands twice (`sum_duplicates` adds them up), for other shapes, and for differences that are not
    finite.
    """
    found = {}
    for name, array in arrays.items():
        coo = array.tocoo()
        axes = coo.coords if hasattr(coo, "coords") else (coo.row, coo.col)
        found[name] = (tuple(coo.shape), np.stack([np.asarray(axis) for axis in axes]), coo.data)
    return _delta(found, dtypes, base)


def to_torch(delta: SparseDelta) -> dict[str, torch.Tensor]:
    """Name -> coalesced torch.sparse_coo_tensor of differences on the CPU, float32 (float64 for
    float64 tensors), of any number of dimensions but none; entries of zero stay.

    Extras are not in it. Raises ConfigError for a tensor without dimensions, DeltaError for a `set`
    tensor without base values.
    """
    refuse_adapters([delta.adapter], "an array of differences by tensor of the base", _WHOLE)
    import torch

    tensors = {}
    for name, tensor in delta.tensors.items():
        if not tensor.shape:
            raise ConfigError(f"tensor {name!r} has no dimensions; leave it out (dk.restrict)")
        tensors[name] = torch.sparse_coo_tensor(
            torch.from_numpy(np.stack(_coordinates(tensor))),
            torch.from_numpy(_differences(tensor).copy()),
            tensor.shape,
            is_coalesced=True,
            check_invariants=True,
        )
    return tensors


def from_torch(
    tensors: Mapping[str, torch.Tensor],
    *,
    dtypes: str | Mapping[str, str] = "float32",
    base: Base | None = None,
) -> SparseDelta:
    """The delta of differences in torch sparse COO tensors; see `from_scipy`.

    Raises DeltaError for a tensor of another layout or with dense dimensions.
    """
    import torch

    found = {}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.sparse_coo or tensor.dense_dim():
            raise DeltaError(
                f"tensor {name!r} is {tensor.layout} with {tensor.dense_dim()} dense dimensions; "
                "give torch.sparse_coo without any (to_sparse_coo)"
            )
        plain = tensor.detach().cpu()
        values = plain._values().to(torch.promote_types(plain.dtype, torch.float32))
        found[name] = (tuple(plain.shape), plain._indices().numpy(), values.numpy())
    return _delta(found, dtypes, base)


def to_vllm(delta: SparseDelta, base: Base | None = None) -> list[WeightPatch]:
    """The patches that vLLM's `load_checkpoint_weight_patches` takes, one for each tensor.

    base: needed for `add` tensors. Extras are not in it: vLLM loads tensors of the checkpoint only.
    Raises ConfigError for dtypes other than floats, for NaN, and where the base is missing.
    Source: vLLM PR 50723 (2026).
    """
    refuse_adapters([delta.adapter], "a patch of weights", _EXPORT)
    import torch

    from deltakit.live.arrays import to_torch as as_tensor

    adds = [name for name, tensor in delta.tensors.items() if tensor.mode == "add"]
    if adds:
        opened = needed(_opened(base), f"tensor {adds[0]!r} holds differences, vLLM new weights")
        delta = rebase(delta, opened, "set")
    patches = []
    for name, tensor in delta.tensors.items():
        check_patch(tensor)
        narrow = tensor.numel <= 2**31
        patches.append(
            WeightPatch(
                name=name,
                shape=tensor.shape,
                dtype=getattr(torch, tensor.dtype),
                values=as_tensor(typed_values(tensor)),
                indices=as_tensor(tensor.indices.astype(np.int32 if narrow else np.int64)),
            )
        )
    return patches


def _opened(base: Base | None) -> Checkpoint | None:
    return base if base is None or isinstance(base, Checkpoint) else Checkpoint(os.fspath(base))


def _differences(tensor: TensorDelta) -> Array:
    changes = changes_of(tensor)
    if changes is None:
        raise DeltaError(
            f"tensor {tensor.name!r} is in set mode without base values, so its differences are "
            "not known; dk.rebase(delta, base, 'add') makes them"
        )
    return changes


def _coordinates(tensor: TensorDelta) -> tuple[Array, ...]:
    return np.unravel_index(tensor.indices, tensor.shape)


def _delta(
    found: Mapping[str, tuple[tuple[int, ...], Array, Array]],
    dtypes: str | Mapping[str, str],
    base: Base | None,
) -> SparseDelta:
    """The delta of shape, coordinates [ndim, nnz] and differences [nnz] by name."""
    checkpoint = _opened(base)
    tensors = {}
    for name, (shape, coordinates, values) in found.items():
        if checkpoint is not None:
            info = checkpoint.info(name)
            if info.shape != shape:
                raise BaseMismatchError(
                    f"tensor {name!r} has shape {list(shape)}, in {checkpoint.path} it has "
                    f"{list(info.shape)}"
                )
            kind = info.dtype
        else:
            kind = dtypes if isinstance(dtypes, str) else dtypes.get(name, "float32")
        flat = flattened(name, shape, coordinates)
        indices, ordered = in_order(name, shape, flat, values)
        if not dtype(kind).is_floating or ordered.dtype.kind not in "fiu":
            raise DeltaError(f"tensor {name!r}: differences of {ordered.dtype} for {kind} weights")
        tensors[name] = TensorDelta(
            name=name, shape=shape, dtype=kind, mode="add", indices=indices, values=ordered
        )
    delta = SparseDelta(tensors=tensors)
    if checkpoint is None:
        return delta
    identity = identify(checkpoint, {name: tensor.indices for name, tensor in tensors.items()})
    return replace(delta, base=identity)
