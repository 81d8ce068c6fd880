"""A delta of a checkpoint with random entries, for benchmarks that need one of a given size."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import identify


def random_delta(
    base: Checkpoint, counts: Mapping[str, int], rng: np.random.Generator, scale: float = 0.01
) -> SparseDelta:
    """So many entries per tensor (drawn with repeats, so a little fewer), with the base's identity.

    Values are normal with this scale; tensors of no entries are left out.
    """
    tensors = {}
    for name, count in counts.items():
        info = base.info(name)
        indices = np.unique(rng.integers(0, info.numel, count))
        if len(indices):
            tensors[name] = TensorDelta(
                name=name,
                shape=info.shape,
                dtype=info.dtype,
                mode="add",
                indices=indices,
                values=rng.standard_normal(len(indices)) * scale,
            )
    identity = identify(base, {name: tensor.indices for name, tensor in tensors.items()})
    return SparseDelta(tensors=tensors, base=identity)
