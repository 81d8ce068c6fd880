"""The exact sparse difference of two checkpoints.

An entry is every element whose bits differ; there is no threshold, and signed zeros and NaN
payloads count. Merging the result into the base gives the tuned tensors back, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deltakit.delta import Mode, SparseDelta, TensorDelta
from deltakit.dtypes import DTYPES, Array, DType, add_exact
from deltakit.errors import ConfigError, CoordinateError, DeltaError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.safetensors_file import TensorInfo
from deltakit.identity import identify

CHUNK = 2**20  # elements of either side that are compared at a time
# What differs in config.json for reasons other than the weights.
_UNRELATED = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def diff(
    base: str | Path | Checkpoint,
    tuned: str | Path | Checkpoint,
    *,
    mode: Mode = "set",
    keep_base: bool = True,
    missing: Literal["error", "ignore"] = "error",
    progress: Callable[[int, int], None] | None = None,
) -> SparseDelta:
    """The delta that turns `base` into `tuned`; both are files or folders, sharded as they like.

    mode: "set" stores the tuned bits; "add" stores differences where base + v gives the tuned bits
    back, entry for entry, and falls back to "set" for every tensor where it does not.
    keep_base: whether set tensors keep the base's bits beside, which weights, stacking and
    truncation by magnitude need. missing: what to do about tensors that only the base has.
    progress: called with (elements done, elements in all).

    Tensors that only `tuned` has become extras, together with the changes of config.json that come
    with them. Memory is O(entries + chunk). Raises CoordinateError for tensors that `tuned` lacks
    or has in another shape, and DeltaError for another dtype.
    """
    if mode not in ("add", "set") or missing not in ("error", "ignore"):
        raise ConfigError(
            f"mode {mode!r} and missing {missing!r}: mode is add or set, missing is error or ignore"
        )
    old = base if isinstance(base, Checkpoint) else Checkpoint(base)
    new = tuned if isinstance(tuned, Checkpoint) else Checkpoint(tuned)
    shared = _shared(old, new, missing)
    total, done = sum(old.tensors[name].numel for name in shared), 0
    tensors = {}
    for name in shared:
        found = _tensor(old, new, name, mode, keep_base)
        if found is not None:
            tensors[name] = found
        done += old.tensors[name].numel
        if progress is not None:
            progress(done, total)
    extras = {n: _whole(new, info) for n, info in new.tensors.items() if n not in old.tensors}
    return SparseDelta(
        tensors=tensors,
        extras=extras,
        base=identify(old, {name: tensor.indices for name, tensor in tensors.items()}),
        config=_config_changes(old, new) if extras else {},
        provenance={"operation": "diff", "mode": mode},
    )


def _shared(old: Checkpoint, new: Checkpoint, missing: str) -> list[str]:
    lacking = [name for name in old.names if name not in new.tensors]
    if lacking and missing == "error":
        listed = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
        raise CoordinateError(
            f"{new.path} lacks {len(lacking)} tensors of {old.path}: {listed}; "
            "missing='ignore' leaves them as they are in the base"
        )
    shared = [name for name in old.names if name in new.tensors]
    for name in shared:
        before, after = old.tensors[name], new.tensors[name]
        if before.shape != after.shape:
            raise CoordinateError(
                f"tensor {name!r} has shape {list(before.shape)} in {old.path} and "
                f"{list(after.shape)} in {new.path}; a delta does not change shapes"
            )
        if before.dtype != after.dtype:
            raise DeltaError(
                f"tensor {name!r} is {before.dtype} in {old.path} and {after.dtype} in {new.path}; "
                "convert one of them first, so that both are stored alike"
            )
    return shared


def _tensor(
    old: Checkpoint, new: Checkpoint, name: str, mode: Mode, keep_base: bool
) -> TensorDelta | None:
    info = old.tensors[name]
    if info.dtype not in DTYPES:
        if not _same_bytes(info, new.tensors[name]):
            raise DeltaError(
                f"tensor {name!r} differs, and its dtype {info.dtype} is not supported"
            )
        return None
    indices, before, after = _differing(old, new, name)
    if not indices.size:
        return None
    added = _proven_differences(before, after, info.kind) if mode == "add" else None
    chosen: Mode = "set" if added is None else "add"
    return TensorDelta(
        name=name,
        shape=info.shape,
        dtype=info.dtype,
        mode=chosen,
        indices=indices,
        values=after if added is None else added,
        base_values=before if keep_base and added is None else None,
    )


def _differing(old: Checkpoint, new: Checkpoint, name: str) -> tuple[Array, Array, Array]:
    """Flat indices of the words that differ, int64 [nnz], and the words of both sides, [nnz]."""
    info = old.tensors[name]
    found: list[tuple[Array, Array, Array]] = [
        (np.empty(0, np.int64), np.empty(0, info.kind.words), np.empty(0, info.kind.words))
    ]
    for start in range(0, info.numel, CHUNK):
        stop = min(start + CHUNK, info.numel)
        before, after = old.read(name, start, stop), new.read(name, start, stop)
        places = np.flatnonzero(before != after)
        if places.size:
            found.append((places + start, before[places], after[places]))
    indices, before, after = (np.concatenate(column) for column in zip(*found, strict=True))
    return indices, before, after


def _proven_differences(before: Array, after: Array, kind: DType) -> Array | None:
    """v [nnz] with round(base + v) == tuned for every entry, bit for bit; None if there is none."""
    if kind.compute is None:
        return None
    base, tuned = before.view(kind.numpy), after.view(kind.numpy)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite fails the proof
        values = np.asarray(tuned.astype(kind.compute) - base.astype(kind.compute))
        if not np.isfinite(values).all():
            return None
        again = add_exact(base, [(1.0, values)]).view(kind.words)
    return values if np.array_equal(again, after) else None


def _whole(checkpoint: Checkpoint, info: TensorInfo) -> Array:
    return checkpoint.read(info.name).view(info.kind.numpy).reshape(info.shape)


def _same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    return all(a == b for a, b in zip(_blocks(one), _blocks(other), strict=True))


def _blocks(info: TensorInfo) -> Iterator[bytes]:
    with info.file.open("rb") as file:
        file.seek(info.offset)
        for start in range(0, info.nbytes, CHUNK):
            yield file.read(min(CHUNK, info.nbytes - start))


def _config_changes(old: Checkpoint, new: Checkpoint) -> dict[str, Any]:
    before, after = old.config() or {}, new.config() or {}
    return {
        key: value
        for key, value in after.items()
        if key not in _UNRELATED and (key not in before or before[key] != value)
    }
