"""Which base does a delta belong to? Short digests of base values, checked in O(entries).

Per touched tensor two digests are recorded: one of up to 1,024 sample positions drawn from the
tensor's name and shape alone, which survives truncation and stacking and exposes two deltas of
different bases without either base, and one of the delta's own indices. Both are taken of the
values cast to the dtype the delta was trained in, so a float32 file and its bfloat16 copy are the
same base to a delta that was trained in bfloat16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from math import prod

import numpy as np

from deltakit.delta import BaseIdentity, Fingerprint, SparseDelta, TensorDelta, in_tensor_order
from deltakit.diffing.grown_rows import appended_to
from deltakit.dtypes import Array, dtype, dtype_of
from deltakit.errors import BaseMismatchError, CoordinateError, nearest
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.safetensors_file import TensorInfo
from deltakit.formats.seeded import philox_words
from deltakit.in_place.journal_record import merged_before

SAMPLES = 1024
NO_BASE = "the delta records no base, so nothing shows that this is the right one"
_STREAM = "base identity"


def sample_positions(name: str, shape: tuple[int, ...]) -> Array:
    """The flat positions by which a tensor's base is recognised, int64 [<= 1024], sorted.

    All positions of a tensor of at most 1,024 elements; otherwise 1,024 words of Philox, keyed by
    the name and the shape, modulo the number of elements, without repetitions.
    """
    numel = prod(shape)
    if numel <= SAMPLES:
        return np.arange(numel, dtype=np.int64)
    stream = f"{_STREAM} {'x'.join(str(n) for n in shape)}"
    words = philox_words(0, name, SAMPLES, stream)
    return np.unique(words % np.uint64(numel)).astype(np.int64)


def fingerprint(values_at_sample: Array, values_at_support: Array | None) -> Fingerprint:
    """The digests of base values given in the trained dtype, NumPy arrays [<= 1024] and [nnz]."""
    support = None if values_at_support is None else _digest(values_at_support)
    return Fingerprint(sample=_digest(values_at_sample), support=support)


def identify(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Array | None],
    trained_dtypes: Mapping[str, str] | None = None,
) -> BaseIdentity:
    """The identity of `checkpoint` for a delta that touches `tensors`.

    tensors: name -> the delta's flat indices, int64 [nnz] (None: no support digest).
    trained_dtypes: name -> dtype in training; the dtype on disk where absent.
    Raises CoordinateError for a tensor that the checkpoint lacks.
    """
    trained = trained_dtypes or {}
    prints = {
        name: fingerprint_of(checkpoint, name, indices, trained.get(name))
        for name, indices in tensors.items()
    }
    return BaseIdentity(
        model_id=checkpoint.model_id,
        revision=checkpoint.revision,
        total_weights=checkpoint.total_weights,
        tensors=in_tensor_order(prints),
    )


def without_support(identity: BaseIdentity | None) -> BaseIdentity | None:
    """The identity without its support digests, for a delta whose indices have changed."""
    if identity is None:
        return None
    tensors = {name: replace(found, support=None) for name, found in identity.tensors.items()}
    return replace(identity, tensors=tensors)


def fingerprint_of(
    checkpoint: Checkpoint, name: str, indices: Array | None, trained_dtype: str | None = None
) -> Fingerprint:
    """The digests of one tensor of `checkpoint`; arguments and errors as for `identify`."""
    info = checkpoint.info(name)
    cast = trained_dtype or info.dtype
    sample = _values(checkpoint, info, sample_positions(name, info.shape), cast)
    support = None if indices is None else _values(checkpoint, info, indices, cast)
    return fingerprint(sample, support)


def check_base(delta: SparseDelta, checkpoint: Checkpoint, *, allow: bool = False) -> list[str]:
    """Check in O(entries) that `checkpoint` is the base of `delta`; returns notes for the user.

    Raises CoordinateError for a tensor that the checkpoint lacks or has in another shape, and
    BaseMismatchError for another dtype or other values. `allow` turns other values, and another
    dtype where `add` can still be done, into notes. Of an adapter's delta the base's tensors are
    checked at which it stands.
    """
    if delta.adapter is not None:
        return _check_adapter(delta, checkpoint, allow)
    known = {} if delta.base is None else delta.base.tensors
    notes: dict[str, list[str]] = {}  # a note -> the tensors that it is about
    for name, tensor in delta.tensors.items():
        info = _info(tensor, checkpoint)
        found = [_check_dtype(tensor, info, allow)]
        if name in known:
            found.append(_check_values(tensor, info, checkpoint, known[name], allow))
        elif delta.base is not None:
            found.append("no base values are recorded, so they are not checked")
        for note in filter(None, found):
            notes.setdefault(note, []).append(name)
    for name, extra in delta.extras.items():
        _check_extra(name, extra, checkpoint)
    first = [NO_BASE] if delta.base is None else []
    return first + [f"{_some(names)}: {note}" for note, names in notes.items()]


def _check_adapter(delta: SparseDelta, checkpoint: Checkpoint, allow: bool) -> list[str]:
    """The same for a delta of an adapter, by the fingerprints of tensors that are not its own."""
    known = {} if delta.base is None else delta.base.tensors
    stands = {name: seen.sample for name, seen in known.items() if name not in delta.tensors}
    others = []
    for name, expected in stands.items():
        if name not in checkpoint.tensors:
            raise CoordinateError(
                f"the adapter stands at tensor {name!r}, which {checkpoint.path} lacks"
                f"{nearest(name, checkpoint.names)}"
            )
        info = checkpoint.tensors[name]
        found = _digest(_values(checkpoint, info, sample_positions(name, info.shape), info.dtype))
        if found != expected and not allow:
            raise BaseMismatchError(
                f"{checkpoint.path} is not the base of the adapter: tensor {name!r} has other values "
                f"or another dtype (sample digest {found}, expected {expected}); "
                f"{_hint(checkpoint)}"
            )
        others += [name] if found != expected else []
    for name, extra in delta.extras.items():
        _check_extra(name, extra, checkpoint)
    if delta.base is None:
        return [NO_BASE]
    if not stands:
        return ["no base values are recorded at the adapter, so they are not checked"]
    told = "the base has other values than the adapter's; used all the same, as asked"
    return [f"{_some(others)}: {told}"] if others else []


def _some(names: list[str]) -> str:
    if len(names) == 1:
        return f"tensor {names[0]!r}"
    return f"{len(names)} tensors (such as {names[0]!r})"


def _info(tensor: TensorDelta, checkpoint: Checkpoint) -> TensorInfo:
    if tensor.name not in checkpoint.tensors:
        raise CoordinateError(
            f"the delta changes tensor {tensor.name!r}, which {checkpoint.path} lacks"
            f"{nearest(tensor.name, checkpoint.names)}"
        )
    info = checkpoint.tensors[tensor.name]
    if info.shape != tensor.shape:
        raise CoordinateError(
            f"tensor {tensor.name!r} has shape {list(tensor.shape)} in the delta and "
            f"{list(info.shape)} in {checkpoint.path}"
        )
    return info


def _check_extra(name: str, extra: Array, checkpoint: Checkpoint) -> None:
    grown = appended_to(name)
    if grown is not None:
        _check_rows(*grown, extra, checkpoint)
    if name in checkpoint.tensors and checkpoint.tensors[name].shape != extra.shape:
        raise CoordinateError(
            f"extra {name!r} has shape {list(extra.shape)}, in {checkpoint.path} it has "
            f"{list(checkpoint.tensors[name].shape)}; shapes are not changed by a delta"
        )


def _check_rows(name: str, rows: int, extra: Array, checkpoint: Checkpoint) -> None:
    """Rows to be appended must fit the tensor as it is: its rows, its columns, its dtype."""
    info = checkpoint.tensors.get(name)
    if info is None:
        raise CoordinateError(
            f"the delta appends rows to tensor {name!r}, which {checkpoint.path} lacks"
            f"{nearest(name, checkpoint.names)}"
        )
    if info.shape[:1] != (rows,) or info.shape[1:] != extra.shape[1:]:
        raise CoordinateError(
            f"the delta appends rows of shape {list(extra.shape[1:])} to tensor {name!r} of {rows} "
            f"rows; in {checkpoint.path} it has shape {list(info.shape)}"
        )
    if info.dtype != dtype_of(extra).name:
        raise BaseMismatchError(
            f"the delta appends rows of {dtype_of(extra).name} to tensor {name!r}, which is "
            f"{info.dtype} in {checkpoint.path}"
        )


def _check_dtype(tensor: TensorDelta, info: TensorInfo, allow: bool) -> str:
    if info.dtype == tensor.dtype:
        return ""
    possible = tensor.mode == "add" and info.kind.is_floating
    what = f"made for {tensor.dtype}, applied to {info.dtype}"
    if possible and info.dtype == tensor.trained_dtype:
        return f"{what}, the dtype of training, which gives the trained bits"
    if possible and allow:
        return f"{what} all the same, as asked"
    hint = "; --allow-base-mismatch adds it all the same" if possible else ""
    raise BaseMismatchError(
        f"{info.file} is not the base of the delta: tensor {tensor.name!r} is "
        f"{info.dtype}, expected {tensor.dtype}{hint}"
    )


def _check_values(
    tensor: TensorDelta, info: TensorInfo, checkpoint: Checkpoint, known: Fingerprint, allow: bool
) -> str:
    positions = {"sample": (sample_positions(tensor.name, tensor.shape), known.sample)}
    if known.support is not None:
        positions["support"] = (tensor.indices, known.support)
    for what, (indices, expected) in positions.items():
        found = _digest(_values(checkpoint, info, indices, tensor.trained_dtype))
        if found == expected:
            continue
        if allow:
            return "the base has other values than the delta's; used all the same, as asked"
        raise BaseMismatchError(
            f"{checkpoint.path} is not the base of the delta: tensor {tensor.name!r} has other "
            f"values ({what} digest {found}, expected {expected}); {_hint(checkpoint)}"
        )
    return ""


def _hint(checkpoint: Checkpoint) -> str:
    merged = merged_before(checkpoint)
    if not merged:
        return "with --allow-base-mismatch, merge, stack and evaluate use it all the same"
    return (
        f"it carries {len(merged)} delta{'' if len(merged) == 1 else 's'} merged in place (journal "
        f"{checkpoint.journal}): deltakit revert {checkpoint.path} first, or merge --in-place, "
        "which starts from the base's own values"
    )


def _values(checkpoint: Checkpoint, info: TensorInfo, indices: Array, cast: str) -> Array:
    """Base values at flat `indices`, [n] in the dtype called `cast`."""
    values = checkpoint.gather(info.name, indices).view(info.kind.numpy)
    with np.errstate(over="ignore", invalid="ignore"):  # a cast may overflow, to inf as in torch
        return np.asarray(values.astype(dtype(cast).numpy))


def _digest(values: Array) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]
