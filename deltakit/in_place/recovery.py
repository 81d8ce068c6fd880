"""Bringing a model to rest when a merge in place, or a revert, was interrupted.

An interrupted merge is rolled back, so that the same command can simply be given again; an
interrupted revert is finished. Both write bits that the journal holds, so they may be interrupted
and repeated themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from deltakit.delta import TensorDelta
from deltakit.dtypes import Array
from deltakit.formats.checkpoint_files import locate
from deltakit.formats.undo_folder import is_unfinished, undo_folder
from deltakit.in_place.journal import Journal
from deltakit.in_place.journal_record import Record, bits_before, changed, merged_bits
from deltakit.in_place.weights import OpenWeights

Progress = Callable[[int, int], None]


def settle(weights: OpenWeights, journal: Journal, *, force: bool = False) -> list[str]:
    """Bring the weights to rest; returns notes for the user, none where nothing was to be done.

    force: write also where an entry is neither what it was before nor what was being written.
    Raises JournalError for such an entry without it.
    """
    notes = []
    if roll_back(weights, journal, force=force) is not None:
        notes.append(f"an interrupted merge into {journal.model} was rolled back first")
    if journal.reverting.exists():
        record = Record.load(journal.reverting)
        record.check_coordinates(weights.checkpoint)
        if not force:
            _check_all(weights, record, {name: t.values for name, t in record.tensors.items()})
        write_back(weights, journal, record)
        notes.append(f"an interrupted revert of {journal.model} was finished first")
    journal.prune()
    return notes


def settle_base(base: Path) -> list[str]:
    """`settle` for the model at `base`, which is only going to be read."""
    if not is_unfinished(undo_folder(locate(base))):
        return []
    with OpenWeights(base) as weights:
        return settle(weights, Journal(weights.checkpoint))


def roll_back(weights: OpenWeights, journal: Journal, *, force: bool = False) -> Record | None:
    """Take back what was written of a merge that has not ended; returns its record, if any."""
    if not journal.next.exists():
        return None
    record, earlier = Record.load(journal.next), journal.merged()
    record.check_coordinates(weights.checkpoint)
    before = {name: bits_before(tensor, earlier) for name, tensor in record.tensors.items()}
    if not force:
        _check_all(weights, record, before)
    for name, tensor in record.tensors.items():
        put(weights, tensor, before[name])
    weights.sync()
    journal.roll_back()
    return record


def write_back(
    weights: OpenWeights, journal: Journal, record: Record, progress: Progress | None = None
) -> None:
    """Write the original bits of `record`, the revert that has begun, and remove the journal."""
    done = 0
    for tensor in record.tensors.values():
        put(weights, tensor, tensor.values)
        done += tensor.nnz
        if progress is not None:
            progress(done, record.entries)
    weights.sync()
    journal.end_revert()


def put(weights: OpenWeights, tensor: TensorDelta, target: Array) -> None:
    """Give the entries of a tensor the words `target` [nnz], writing those that differ."""
    differ = np.flatnonzero(weights.checkpoint.gather(tensor.name, tensor.indices) != target)
    weights.write(tensor.name, tensor.indices[differ], target[differ])


def _check_all(weights: OpenWeights, record: Record, before: dict[str, Array]) -> None:
    """Raise JournalError for an entry of which any byte is neither the old nor the new one: a word
    that was half written when the power failed is taken back, one that others wrote is not."""
    for name, tensor in record.tensors.items():
        found = weights.checkpoint.gather(name, tensor.indices)
        old, new = _bytes(before[name]), _bytes(merged_bits(tensor))
        foreign = ~((_bytes(found) == old) | (_bytes(found) == new)).all(axis=1)
        if foreign.any():
            at = int(np.flatnonzero(foreign)[0])
            raise changed(weights.checkpoint, tensor, at, found, before[name])


def _bytes(words: Array) -> Array:
    return words.view(np.uint8).reshape(len(words), words.itemsize)
