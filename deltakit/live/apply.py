"""Applying deltas to live models, in place, and taking them back bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array, add_exact, dtype
from deltakit.errors import BaseMismatchError, ConfigError, CoordinateError, nearest
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import fingerprint, sample_positions
from deltakit.live.arrays import dtype_name, to_numpy, to_torch
from deltakit.live.coordinates import checkpoint_names, find_checkpoint, live_tensors


@dataclass
class Handle:
    """An applied delta: what the weights were before, to give it back."""

    _saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def write(self, parameter: torch.Tensor, indices: Array, new: torch.Tensor) -> None:
        """Overwrite entries of a live tensor, keeping their old bits."""
        flat = parameter.data.view(-1)
        at = torch.from_numpy(indices).to(flat.device)
        self._saved.append((flat, at, flat[at].clone()))
        flat[at] = new.to(flat.device)

    def revert(self) -> None:
        """Restore every overwritten weight to its very bits; a second call does nothing."""
        while self._saved:
            flat, at, old = self._saved.pop()
            flat[at] = old


def apply(
    model: torch.nn.Module,
    deltas: SparseDelta | Sequence[SparseDelta],
    weights: Sequence[float] | None = None,
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    allow_base_mismatch: bool = False,
) -> Handle:
    """Add deltas to a live model in place, by the arithmetic of merging.

    base: the checkpoint the model was loaded from, found through the model by default; it maps
    live names to the deltas' names. Extras replace the live tensors of their names. Everything is
    checked before anything is written. Raises CoordinateError for tensors or shapes the model
    lacks, BaseMismatchError for a delta of another base, ConfigError for weights that do not fit.
    """
    several = [deltas] if isinstance(deltas, SparseDelta) else list(deltas)
    factors = [1.0] * len(several) if weights is None else list(weights)
    if len(factors) != len(several):
        raise ConfigError(f"{len(factors)} weights for {len(several)} deltas")
    checkpoint = (
        base if base is None or isinstance(base, Checkpoint) else Checkpoint(os.fspath(base))
    )
    live = _by_stored_name(model, checkpoint or find_checkpoint(model))
    for delta in several:
        _check(delta, live, allow_base_mismatch)
    changes = []
    for name in sorted({n for d in several for n in d.tensors}, key=str.encode):
        pairs = zip(factors, several, strict=True)
        terms = [(w, d.tensors[name]) for w, d in pairs if name in d.tensors]
        changes.append((live[name], *_new_values(live[name], terms)))
    for name, array in ((n, a) for d in several for n, a in d.extras.items()):
        whole = to_torch(array).reshape(-1).to(live[name].dtype)
        changes.append((live[name], np.arange(array.size), whole))
    handle = Handle()
    for parameter, indices, new in changes:
        handle.write(parameter, indices, new)
    return handle


@contextmanager
def applied(
    model: torch.nn.Module,
    deltas: SparseDelta | Sequence[SparseDelta],
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


def _by_stored_name(
    model: torch.nn.Module, checkpoint: Checkpoint | None
) -> dict[str, torch.Tensor]:
    live = live_tensors(model)
    names = checkpoint_names(model, checkpoint, buffers=True)
    return {stored or name: live[name] for name, stored in names.items()}


def _check(delta: SparseDelta, live: Mapping[str, torch.Tensor], allow_base_mismatch: bool) -> None:
    shapes = {n: t.shape for n, t in delta.tensors.items()}
    shapes |= {n: a.shape for n, a in delta.extras.items()}
    for name, shape in shapes.items():
        if name not in live:
            raise CoordinateError(f"the model has no tensor {name!r}{nearest(name, list(live))}")
        if tuple(live[name].shape) != shape:
            raise CoordinateError(
                f"tensor {name!r}: the delta has shape {list(shape)}, the model "
                f"{list(live[name].shape)}"
            )
        if not live[name].data.is_contiguous():
            raise CoordinateError(f"tensor {name!r} is not contiguous in the model")
    if allow_base_mismatch or delta.base is None:
        return
    for name, tensor in delta.tensors.items():
        recorded = delta.base.tensors.get(name)
        found = _sample_digest(live[name], tensor)
        if recorded is not None and found != recorded.sample:
            raise BaseMismatchError(
                f"tensor {name!r}: the delta belongs to another base (digest of sampled values "
                f"{recorded.sample}, this model has {found}); allow_base_mismatch=True overrides"
            )


def _sample_digest(parameter: torch.Tensor, tensor: TensorDelta) -> str:
    positions = torch.from_numpy(sample_positions(tensor.name, tensor.shape)).to(parameter.device)
    values = to_numpy(parameter.data.view(-1)[positions])
    return fingerprint(values.astype(dtype(tensor.trained_dtype).numpy), None).sample


def _new_values(
    parameter: torch.Tensor, terms: list[tuple[float, TensorDelta]]
) -> tuple[Array, torch.Tensor]:
    """The union of supports, and the live tensor's new values there."""
    union = np.unique(np.concatenate([t.indices for _, t in terms]))
    old = to_numpy(parameter.data.view(-1)[torch.from_numpy(union).to(parameter.device)])
    kind = dtype(dtype_name(parameter))
    if any(t.mode == "set" for _, t in terms):
        return union, _set_values(old, union, terms)
    parts = []
    for weight, tensor in terms:
        values = np.zeros(len(union), kind.compute)
        values[np.searchsorted(union, tensor.indices)] = tensor.values
        parts.append((weight, values))
    return union, to_torch(add_exact(old, parts))


def _set_values(old: Array, union: Array, terms: list[tuple[float, TensorDelta]]) -> torch.Tensor:
    weight, tensor = terms[0]
    if len(terms) > 1 or weight != 1.0:
        raise ConfigError(
            f"tensor {tensor.name!r} is in set mode: it applies alone and with weight 1"
        )
    new = tensor.values.view(tensor.kind.numpy).astype(old.dtype, copy=False)
    return to_torch(new)
