"""Deltas of which a job reads the entries of its own tensors only; of the others it knows what the
header tells: names, shapes and dtypes, which say what the merged checkpoint will look like."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import numpy as np

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import DTYPES
from deltakit.errors import DeltaError
from deltakit.formats.header import TensorRecord
from deltakit.formats.sdelta import SdeltaFile


def read_tensors(
    file: SdeltaFile, own: AbstractSet[str] | None
) -> tuple[SparseDelta, frozenset[str]]:
    """The delta in a file with the entries of the tensors `own` (None: of all), and the tensors with
    entries that were left out.

    Of an adapter all is read, as its tensors are not those of the base.
    """
    left: set[str] = set()
    if own is not None and file.adapter is None:
        left = {name for name in file.tensors if name not in own}
    tensors = {
        name: _outline(record) if name in left else file.tensor(name)
        for name, record in file.tensors.items()
    }
    delta = SparseDelta(
        tensors=tensors,
        extras={name: file.extra(name) for name in file.extras},
        base=file.base,
        config=file.config,
        provenance=file.provenance,
        adapter=file.adapter,
    )
    return delta, frozenset(name for name in left if file.tensors[name].nnz)


def read_again(before: SdeltaFile, own: AbstractSet[str]) -> tuple[SparseDelta, frozenset[str]]:
    """`read_tensors` of a file that was closed; DeltaError where it is another one now."""
    with SdeltaFile(before.path) as file:
        if file.header != before.header:
            raise DeltaError(f"{before.path} was replaced by another delta meanwhile; start again")
        return read_tensors(file, own)


def _outline(record: TensorRecord) -> TensorDelta:
    """A tensor as its record tells it, without entries."""
    kind = DTYPES[record.dtype]
    return TensorDelta(
        name=record.name,
        shape=record.shape,
        dtype=record.dtype,
        mode=record.mode,
        indices=np.empty(0, np.int64),
        values=np.empty(0, kind.words if record.mode == "set" else kind.compute),
        trained_dtype=record.trained_dtype,
    )
