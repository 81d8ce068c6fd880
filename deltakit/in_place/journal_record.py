"""What an in-place merge changes, as a delta that takes it back.

It is an `.sdelta` file like any other. For each tensor that is touched its values are the original
bits, in `set` mode, and its base values the bits that the merge leaves; whole tensors that are
written (extras) stand there as tensors with all their entries. Its provenance says what was merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array
from deltakit.errors import FormatError, JournalError, UnsupportedVersionError
from deltakit.formats import sdelta
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.undo_folder import UNDO

VERSION = 1
_KEY = "in_place"


@dataclass(frozen=True, slots=True)
class Merged:
    """A delta that was merged: what messages call it, its weight, its file in the journal."""

    label: str
    weight: float
    file: str


@dataclass(frozen=True, slots=True)
class Record:
    """What in-place merges have changed in a model since it was the base.

    tensors: name -> its entries; `values` are the original bits, `base_values` the merged ones.
    merged: the deltas, in order. files: names of the model's weight files. through_links: whether
    links to the weights were allowed.
    """

    tensors: Mapping[str, TensorDelta]
    merged: Sequence[Merged]
    files: Sequence[str]
    through_links: bool

    @property
    def entries(self) -> int:
        """Entries over all tensors."""
        return sum(tensor.nnz for tensor in self.tensors.values())

    def encode(self) -> bytes:
        """The bytes of its file; equal records have equal bytes."""
        told = {
            "version": VERSION,
            "merged": [asdict(each) for each in self.merged],
            "files": list(self.files),
            "through_links": self.through_links,
        }
        return sdelta.encode(SparseDelta(tensors=self.tensors, provenance={_KEY: told}))

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read one, every byte checked; FormatError for a file that is none, and as `load` does."""
        delta = sdelta.load(path)
        told = described(delta.provenance, path)
        for name, tensor in delta.tensors.items():
            if tensor.mode != "set" or tensor.base_values is None:
                raise FormatError(f"{path}: tensor {name!r} does not hold both original and merged")
        return cls(delta.tensors, told.merged, told.files, told.through_links)

    def check_coordinates(self, checkpoint: Checkpoint) -> None:
        """Raise JournalError unless the checkpoint has all tensors, in these shapes and dtypes."""
        for name, tensor in self.tensors.items():
            info = checkpoint.tensors.get(name)
            found = None if info is None else (info.dtype, info.shape)
            if found != (tensor.dtype, tensor.shape):
                raise JournalError(
                    f"{checkpoint.path} is not the model that was merged into: expected tensor "
                    f"{name!r} as {tensor.dtype} {list(tensor.shape)}, found "
                    + ("none" if found is None else f"{found[0]} {list(found[1])}")
                )


def described(provenance: Mapping[str, Any], path: Path) -> Record:
    """A record's description alone, from the provenance of the file at `path`, without tensors."""
    told = provenance.get(_KEY)
    if not isinstance(told, dict):
        raise FormatError(f"{path} is not the undo record of an in-place merge")
    if told.get("version") != VERSION:
        raise UnsupportedVersionError(
            f"{path}: version {told.get('version')} of the undo record is not known; expected "
            f"{VERSION}, upgrade deltakit-sparse"
        )
    try:
        merged = [Merged(**each) for each in told["merged"]]
        return Record({}, merged, list(told["files"]), bool(told["through_links"]))
    except (KeyError, TypeError) as error:
        raise FormatError(f"{path}: the undo record lacks {error}") from None


def merged_before(checkpoint: Checkpoint) -> Sequence[Merged]:
    """The deltas that merges in place have left in a checkpoint as it is read, in order."""
    undo = checkpoint.journal / UNDO
    if isinstance(checkpoint, Original) or not undo.exists():
        return ()
    with sdelta.SdeltaFile(undo) as file:
        return described(file.provenance, undo).merged


def merged_bits(tensor: TensorDelta) -> Array:
    """The bits that the merge leaves, words [nnz]."""
    assert tensor.base_values is not None  # Record.load and the merge see to it
    return tensor.base_values


def laid_over(words: Array, at: Array, tensor: TensorDelta | None, bits: Array | None) -> Array:
    """`words` [n] at flat indices `at` [n], with the tensor's `bits` [nnz] where it has entries."""
    if tensor is None or bits is None or not tensor.nnz:
        return words
    place = tensor.indices.searchsorted(at)
    place[place == tensor.nnz] = 0
    found = tensor.indices[place] == at
    result = words.copy()
    result[found] = bits[place[found]]
    return result


class Original(Checkpoint):
    """A checkpoint as it was before the merges that `record` tells of.

    `gather` alone looks through to the original bits; `words` and `read` show the file.
    """

    def __init__(self, path: str | Path, record: Record | None) -> None:
        super().__init__(path)
        self._record = {} if record is None else record.tensors

    def gather(self, name: str, indices: Array) -> Array:
        """The original raw words of a tensor at flat `indices` (int64 [n], any order), [n]."""
        words = super().gather(name, indices)
        tensor = self._record.get(name)
        return words if tensor is None else laid_over(words, indices, tensor, tensor.values)


def bits_before(tensor: TensorDelta, earlier: Record | None) -> Array:
    """The bits of a tensor's entries before the merge of `tensor` was written, words [nnz]: those
    that the earlier merges left, or the original ones."""
    known = None if earlier is None else earlier.tensors.get(tensor.name)
    if known is None:
        return tensor.values
    return laid_over(tensor.values, tensor.indices, known, merged_bits(known))


def check_bits(checkpoint: Checkpoint, record: Record) -> None:
    """Raise JournalError where the weights are not what the merge has left."""
    for name, tensor in record.tensors.items():
        found = checkpoint.gather(name, tensor.indices)
        wrong = np.flatnonzero(found != merged_bits(tensor))
        if wrong.size:
            raise changed(checkpoint, tensor, int(wrong[0]), found, merged_bits(tensor))


def changed(
    checkpoint: Checkpoint, tensor: TensorDelta, at: int, found: Array, expected: Array
) -> JournalError:
    """The error for entry number `at` of a tensor, which something else has changed."""
    digits = 2 * found.itemsize
    return JournalError(
        f"{checkpoint.info(tensor.name).file} was changed by something else since it was merged "
        f"into: tensor {tensor.name!r} holds 0x{int(found[at]):0{digits}x} at index "
        f"{tensor.indices[at]}, expected 0x{int(expected[at]):0{digits}x}; deltakit revert --force "
        "writes the original bits all the same"
    )
