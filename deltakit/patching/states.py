"""Two states of a live model, compared bit for bit, a chunk at a time, on host or device.

A state is a state dict, a module, or a checkpoint on disk; its tensors are known by their names in
the checkpoint. Weights on a device are compared there, and only the entries come to the host.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch

from deltakit.delta import Fingerprint, TensorDelta, in_tensor_order
from deltakit.dtypes import Array, DType, dtype, dtype_of
from deltakit.errors import CoordinateError, DeltaError, nearest
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import fingerprint, sample_positions
from deltakit.live.arrays import dtype_name
from deltakit.live.coordinates import Coordinates, coordinates, find_checkpoint, live_tensors
from deltakit.live.translation import stored_values
from deltakit.patching.digests import TensorKeys, hexadecimal

State = Mapping[str, torch.Tensor] | torch.nn.Module | Checkpoint | str | os.PathLike[str]
Words = Array | torch.Tensor
T = TypeVar("T")

CHUNK = 2**22  # elements of either side that are compared at a time
_SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class FlatTensor:
    """The raw bits of one tensor.

    words: [numel], on the host a NumPy array of unsigned integers of the dtype's width that shares
    the tensor's memory, elsewhere a torch tensor of integers that does.
    """

    name: str
    shape: tuple[int, ...]
    kind: DType
    words: Words

    def copied(self, on_host: bool) -> FlatTensor:
        """The same bits in memory of their own, on the host or where they are."""
        if isinstance(self.words, torch.Tensor):
            copy: Words = host_words(self.words, self.kind) if on_host else self.words.clone()
        else:
            copy = self.words.copy()
        return FlatTensor(self.name, self.shape, self.kind, copy)

    def gather(self, indices: Array) -> Array:
        """The bits at flat indices, int64 [n], on the host: unsigned integers [n]."""
        if isinstance(self.words, torch.Tensor):
            at = torch.from_numpy(indices).to(self.words.device)
            return host_words(self.words[at], self.kind)
        return np.asarray(self.words[indices])

    def put(self, indices: Array, values: Array) -> None:
        """Overwrite the bits at flat indices, int64 [n], by unsigned integers [n]."""
        if isinstance(self.words, torch.Tensor):
            new = torch.from_numpy(values.view(f"<i{self.kind.itemsize}")).to(self.words.device)
            at = torch.from_numpy(indices).to(self.words.device)
            self.words[at] = new.view(self.words.dtype)
        else:
            self.words[indices] = values

    def digest_term(self) -> int:
        """What the tensor adds to the digest of its state."""
        return self.keys().whole(host_words(self.words, self.kind))

    def keys(self) -> TensorKeys:
        """Its keys of the digest."""
        return TensorKeys(self.name, self.shape, self.kind)

    def sample(self) -> Array:
        """The bits at the positions by which a base is recognised, unsigned integers [<= 1024]."""
        return self.gather(sample_positions(self.name, self.shape))


@dataclass(frozen=True, slots=True)
class Difference:
    """What changed in one tensor: its entries, its fingerprint before, and what the digest gains."""

    tensor: TensorDelta
    before: Fingerprint
    gained: int


def flat_tensors(state: State, names: Mapping[str, str] | None = None) -> dict[str, FlatTensor]:
    """Name in the checkpoint -> the tensor's bits, in tensor order; tied tensors once.

    state: a module (see `flat_model`), a state dict, or a checkpoint. names: name in a state dict
    -> name in the checkpoint; other names stay. Raises CoordinateError for a tensor that is
    distributed or has no data and for two tensors of one name, DeltaError for a dtype that deltakit
    cannot read.
    """
    if isinstance(state, torch.nn.Module):
        return flat_model(coordinates(state, find_checkpoint(state), buffers=True), state)
    if isinstance(state, (Checkpoint, str, os.PathLike)):
        checkpoint = state if isinstance(state, Checkpoint) else Checkpoint(os.fspath(state))
        found = checkpoint.tensors.items()
        return {n: FlatTensor(n, i.shape, i.kind, checkpoint.words(n)) for n, i in found}
    flat: dict[str, FlatTensor] = {}
    tied = ties(state)
    for name, tensor in state.items():
        new = name if names is None else names.get(name, name)
        if new in flat:
            raise CoordinateError(f"two tensors of the state are called {new!r}")
        if name not in tied:
            flat[new] = _flat(new, tensor)
    return in_tensor_order(flat)


def flat_model(where: Coordinates, model: torch.nn.Module) -> dict[str, FlatTensor]:
    """A model's parameters and saved buffers in the coordinates of its checkpoint.

    What the checkpoint holds rearranged (fused experts) is a copy, all else the model's memory.
    """
    live = live_tensors(model)
    flat = {}
    for stored, name in where.live.items():
        if name not in where.regions:
            flat[stored] = _flat(stored, live[name])
    for stored, regions in where.by_stored.items():
        shape = regions[0].stored_shape
        values = stored_values(stored, np.arange(prod(shape)), where, live)
        kind = dtype_of(values)
        flat[stored] = FlatTensor(stored, shape, kind, values.view(kind.words))
    return in_tensor_order(flat)


def ties(state: State) -> dict[str, str]:
    """Name -> the earlier name under which a state dict or a module holds the same memory."""
    if isinstance(state, torch.nn.Module):
        state = state.state_dict()
    if not isinstance(state, Mapping):
        return {}
    first: dict[Any, str] = {}
    found = {}
    for name, tensor in state.items():
        if tensor.numel() and tensor.data_ptr():
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            earlier = first.setdefault(place, name)
            if earlier != name:
                found[name] = earlier
    return found


def require_alike(old: Mapping[str, FlatTensor], new: Mapping[str, FlatTensor]) -> None:
    """Raise CoordinateError unless both have the same names and shapes, DeltaError for dtypes."""
    for mine, others, side in ((old, new, "second"), (new, old, "first")):
        lacking = [name for name in mine if name not in others]
        if lacking:
            raise CoordinateError(
                f"the {side} state lacks tensor {lacking[0]!r}"
                + (
                    f" and {len(lacking) - 1} more"
                    if lacking[1:]
                    else nearest(lacking[0], [*others])
                )
                + "; both must hold the same tensors (tied ones under their first name)"
            )
    for name, before in old.items():
        after = new[name]
        if before.shape != after.shape:
            raise CoordinateError(
                f"tensor {name!r} has shape {list(before.shape)} in the first state and "
                f"{list(after.shape)} in the second; a weight patch keeps shapes"
            )
        if before.kind != after.kind:
            raise DeltaError(
                f"tensor {name!r} is {before.kind.name} in the first state and {after.kind.name} in "
                "the second; cast one of them first, so that bits can be compared"
            )


def differences(
    old: Mapping[str, FlatTensor], new: Mapping[str, FlatTensor], *, keep_base: bool
) -> list[Difference]:
    """What differs between two states of the same tensors, in tensor order; `set` entries.

    Temporaries are bounded by the chunk and the entries, per thread. Raises as `require_alike`.
    """
    require_alike(old, new)
    made = in_threads(lambda name: _difference(old[name], new[name], keep_base), old)
    return [each for each in made if each is not None]


def state_digest(state: State, *, names: Mapping[str, str] | None = None) -> str:
    """The digest of all weights of a state, 16 hexadecimal digits; see `deltakit.patching.digests`.

    state, names: as for `flat_tensors`. Reads everything once: seconds for a model of 1 billion
    weights. A file, a module and a state dict with the same tensors give the same digest.
    """
    return total_digest(flat_tensors(state, names))


def total_digest(tensors: Mapping[str, FlatTensor]) -> str:
    """The digest of a state given by its tensors."""
    return hexadecimal(sum(in_threads(FlatTensor.digest_term, tensors.values())))


def in_threads(function: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
    """The results in order; NumPy's loops over large arrays run side by side."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def flat_words(tensor: torch.Tensor, kind: DType) -> Words:
    """The bits of a tensor as `FlatTensor.words`; a copy only where it is not contiguous."""
    words = tensor.detach().reshape(-1).view(_SIGNED[kind.itemsize])
    return words.numpy().view(kind.words) if words.device.type == "cpu" else words


def host_words(words: Words, kind: DType) -> Array:
    """The bits on the host, unsigned integers."""
    return words.cpu().numpy().view(kind.words) if isinstance(words, torch.Tensor) else words


def differing(before: FlatTensor, after: FlatTensor) -> tuple[Array, Array, Array]:
    """Flat indices of the elements that differ, int64 [nnz], and the bits of both there, [nnz]."""
    kind = before.kind
    found = [(np.empty(0, np.int64), np.empty(0, kind.words), np.empty(0, kind.words))]
    for start in range(0, len(before.words), CHUNK):
        old, new = before.words[start : start + CHUNK], after.words[start : start + CHUNK]
        if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
            at, old, new = on_device(old, new.to(old.device))
        else:
            at, old, new = _on_host(host_words(old, kind), host_words(new, kind))
        if len(at):
            places = host_words(at, dtype("int64")).view(np.int64)
            found.append((places + start, host_words(old, kind), host_words(new, kind)))
    indices, old_bits, new_bits = (np.concatenate(column) for column in zip(*found, strict=True))
    return indices, old_bits, new_bits


def on_device(old: torch.Tensor, new: torch.Tensor) -> tuple[Words, Words, Words]:
    """Where two chunks of integers on one device differ, and both there, [n] each."""
    at = (old != new).nonzero().view(-1)
    return at, old[at], new[at]


def _on_host(old: Array, new: Array) -> tuple[Words, Words, Words]:
    """As on_device. Few words differ, so 8 bytes are compared at a time and then looked into."""
    each = 8 // old.itemsize
    if len(old) % each == 0 and old.flags.c_contiguous and new.flags.c_contiguous:
        wide_old, wide_new = old.view(np.uint64), new.view(np.uint64)
        wide = np.flatnonzero(wide_old != wide_new)
        old, new = wide_old[wide].view(old.dtype), wide_new[wide].view(new.dtype)
        within = np.flatnonzero(old != new)
        return wide[within // each] * each + within % each, old[within], new[within]
    at = np.flatnonzero(old != new)
    return at, old[at], new[at]


def _difference(before: FlatTensor, after: FlatTensor, keep_base: bool) -> Difference | None:
    indices, old, new = differing(before, after)
    if not len(indices):
        return None
    tensor = TensorDelta(
        name=before.name,
        shape=before.shape,
        dtype=before.kind.name,
        mode="set",
        indices=indices,
        values=new,
        base_values=old if keep_base else None,
    )
    known = fingerprint(before.sample(), old)
    return Difference(tensor, known, before.keys().change(indices, old, new))


def _flat(name: str, tensor: torch.Tensor) -> FlatTensor:
    if hasattr(tensor, "full_tensor"):
        raise CoordinateError(
            f"tensor {name!r} is distributed over devices; gather it first (its full_tensor())"
        )
    if tensor.device.type == "meta":
        raise CoordinateError(f"tensor {name!r} is on the meta device and holds no weights")
    kind = dtype(dtype_name(tensor))
    return FlatTensor(name, tuple(tensor.shape), kind, flat_words(tensor, kind))
