"""Whether a live model is the base of a delta."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array, dtype, dtype_of
from deltakit.errors import BaseMismatchError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import fingerprint, sample_positions

Read = Callable[[str, Array], Array]  # name in the checkpoint, flat indices [n] -> base values [n]


def check_live_base(delta: SparseDelta, read: Read, checkpoint: Checkpoint | None) -> None:
    """Raise BaseMismatchError when the model's base values are not those recorded in the delta.

    They are compared at sampled positions and at the delta's own indices, where recorded, in the
    dtype of training. Where the model was loaded in a narrower dtype, the checkpoint's values are
    compared with the recorded ones, and the model's with the checkpoint's. A delta without a base
    passes.
    """
    recorded = {} if delta.base is None else delta.base.tensors
    for name, tensor in delta.tensors.items():
        if name not in recorded:
            continue
        digests = [(sample_positions(name, tensor.shape), recorded[name].sample)]
        if recorded[name].support is not None:
            digests.append((tensor.indices, str(recorded[name].support)))
        for positions, expected in digests:
            found = _digest(read(name, positions), tensor)
            if found != expected and not _loaded_narrower(
                tensor, positions, expected, read, checkpoint
            ):
                raise BaseMismatchError(
                    f"tensor {name!r}: the delta belongs to another base (digest of sampled values "
                    f"{expected}, this model has {found}); allow_base_mismatch=True overrides"
                )


def _digest(values: Array, tensor: TensorDelta) -> str:
    return fingerprint(_cast(values, tensor.trained_dtype), None).sample


def _cast(values: Array, name: str) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):  # a cast may overflow, to inf as in torch
        return np.asarray(values.astype(dtype(name).numpy))


def _loaded_narrower(
    tensor: TensorDelta,
    positions: Array,
    expected: str,
    read: Read,
    checkpoint: Checkpoint | None,
) -> bool:
    """Whether the model holds the checkpoint's values cast to its own dtype, and they are right."""
    if checkpoint is None or tensor.name not in checkpoint.tensors:
        return False
    live = read(tensor.name, positions)
    info = checkpoint.tensors[tensor.name]
    stored = checkpoint.gather(tensor.name, positions).view(info.kind.numpy)
    if dtype_of(live).itemsize >= info.kind.itemsize:
        return False
    same = _cast(stored, dtype_of(live).name).tobytes() == live.tobytes()
    return same and _digest(stored, tensor) == expected
