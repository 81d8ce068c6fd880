"""Merging onto tensors that bitsandbytes has quantised, by quantising them again.

Only blocks that hold entries are dequantised, changed by the merge arithmetic in the dtype of the
delta's base, and quantised again with the settings they have; all others keep their codes. Names,
shapes and dtypes stay, so the merged file has the header of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import Lock

import numpy as np

from deltakit.delta import TensorDelta
from deltakit.dtypes import Array
from deltakit.errors import BaseMismatchError, CoordinateError, DeltaError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.merging.arithmetic import Contribution, cast, merged_words, union_between
from deltakit.merging.bitsandbytes_blocks import Blocks, Codes, blocks_of
from deltakit.merging.quantized import Quantized, Survival

_CHUNK = 2**18  # weights that are dequantised at a time
# Models whose layers are transformers' Conv1D: their weights are quantised transposed.
_TRANSPOSED = ("decision_transformer", "gpt2", "imagegpt", "openai-gpt")


class Requantizer:
    """The quantised tensors that a merge touches, each computed when the first of its stored
    tensors is written; one at a time is in memory, however many threads write.

    touched: tensor name -> the contributions to it. `parts` maps the name of every stored tensor
    that changes (codes and statistics) to what returns its bytes.

    Raises CoordinateError for deltas of another shape than the tensor had before it was quantised,
    BaseMismatchError for deltas of different dtypes or of raw codes, DeltaError for statistics
    that a delta changes too, and FormatError for statistics that do not fit.
    """

    def __init__(
        self,
        base: Checkpoint,
        quantized: Mapping[str, Quantized],
        touched: Mapping[str, Sequence[Contribution]],
    ) -> None:
        self._touched = {name: touched[name] for name in quantized if name in touched}
        self._blocks = {name: blocks_of(base, quantized[name]) for name in self._touched}
        turned = (base.config() or {}).get("model_type") in _TRANSPOSED
        for name, parts in self._touched.items():
            clash = [other for other in quantized[name].statistics if other in touched]
            if clash:
                raise DeltaError(
                    f"tensor {name!r} is to be quantised again, and another delta changes its "
                    f"statistics {clash[0]!r}; merge one after the other"
                )
            for part in parts:
                _check(part.delta, parts[0].delta, quantized[name], self._blocks[name], turned)
        self.parts: dict[str, Callable[[], list[memoryview]]] = {
            stored: partial(self._pieces, name, stored)
            for name, blocks in self._blocks.items()
            for stored in blocks.written
        }
        self.peak_memory = max(
            (_peak(base, name, b) for name, b in self._blocks.items()), default=0
        )
        self._survivals: dict[str, Survival] = {}
        self._last: tuple[str, dict[str, Array]] | None = None
        self._lock = Lock()

    def survival(self) -> Survival:
        """What survives in all tensors; computes those that have not been written."""
        for name in self._touched:
            if name not in self._survivals:
                self._merged(name)
        found = self._survivals.values()
        return Survival(
            tensors=len(found),
            entries=sum(each.entries for each in found),
            survived=sum(each.survived for each in found),
            moved=sum(each.moved for each in found),
        )

    def _pieces(self, name: str, stored: str) -> list[memoryview]:
        with self._lock:
            if self._last is None or self._last[0] != name:
                self._last = None  # frees one before the next is made
                self._last = (name, self._merged(name))
            array = self._last[1][stored]
            return [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data]

    def _merged(self, name: str) -> dict[str, Array]:
        """The stored tensors after the merge, by name; counts what survives."""
        blocks, parts = self._blocks[name], self._touched[name]
        numel = parts[0].delta.numel
        at = union_between(parts, 0, numel)
        old = blocks.read()
        new = Codes(old.codes.copy(), old.scales.copy())
        for ids in _chunks(np.unique(at // blocks.size), blocks):
            words = blocks.dequantize(old.codes[ids], old.scales[ids])
            inside, place = _places(at, ids, blocks.size)
            before = cast(words.reshape(-1)[place], blocks.kind, parts[0].delta.kind)
            after = merged_words(before, at[inside], parts, parts[0].delta.kind)
            words.reshape(-1)[place] = cast(after, parts[0].delta.kind, blocks.kind)
            if ids[-1] == len(old.codes) - 1:  # codes behind the last weight stand for nothing
                words[-1, numel - ids[-1] * blocks.size :] = 0
            new.codes[ids], new.scales[ids] = blocks.quantize(words)
        new = blocks.settled(old, new)
        self._survivals[name] = _survival(blocks, old, new, at, numel)
        return blocks.stored(new)


def _check(
    delta: TensorDelta, first: TensorDelta, quantized: Quantized, blocks: Blocks, turned: bool
) -> None:
    name, file = delta.name, quantized.info.file
    if delta.dtype != first.dtype or not delta.kind.is_floating:
        raise BaseMismatchError(
            f"tensor {name!r}: deltas were made for {first.dtype} and {delta.dtype}; to be "
            "quantised again, all must be made for one floating dtype"
        )
    if delta.shape != blocks.shape:
        raise CoordinateError(
            f"tensor {name!r} has shape {list(delta.shape)} in the delta and had shape "
            f"{list(blocks.shape)} before it was quantised in {file}"
        )
    if turned and len(delta.shape) == 2:
        raise CoordinateError(
            f"tensor {name!r} is quantised transposed in {file}, as transformers does with Conv1D "
            "layers; merge into the full-precision base"
        )


def _survival(blocks: Blocks, old: Codes, new: Codes, at: Array, numel: int) -> Survival:
    differ = (old.scales != new.scales) | (old.codes != new.codes).any(axis=1)
    changed = survived = 0
    for ids in _chunks(np.flatnonzero(differ), blocks):
        pair = [blocks.dequantize(each.codes[ids], each.scales[ids]) for each in (old, new)]
        before, after = (words.view(blocks.kind.numpy).reshape(-1) for words in pair)
        moved = before != after
        if ids[-1] == len(old.codes) - 1:
            moved[(len(ids) - 1) * blocks.size + numel - ids[-1] * blocks.size :] = False
        _, place = _places(at, ids, blocks.size)
        changed += int(np.count_nonzero(moved))
        survived += int(np.count_nonzero(moved[place]))
    return Survival(tensors=1, entries=len(at), survived=survived, moved=changed - survived)


def _chunks(ids: Array, blocks: Blocks) -> list[Array]:
    """Ids of blocks, sorted int64 [n], in chunks of bounded size."""
    step = max(1, _CHUNK // blocks.size)
    return [ids[start : start + step] for start in range(0, len(ids), step)]


def _places(at: Array, ids: Array, size: int) -> tuple[Array, Array]:
    """Which of the flat indices `at` lie in the blocks `ids`, as positions in `at`, and where they
    stand in these blocks laid end to end; int64 [n] both."""
    low, high = np.searchsorted(at, [ids[0] * size, (ids[-1] + 1) * size])
    inside = np.arange(low, high)
    row = np.searchsorted(ids, at[low:high] // size)
    row = np.minimum(row, len(ids) - 1)
    own = ids[row] == at[low:high] // size
    return inside[own], (row * size + at[low:high] % size)[own]


def _peak(base: Checkpoint, name: str, blocks: Blocks) -> int:
    """Bytes: codes and scales before, after and as stored, and the work on one chunk."""
    stored = sum(base.info(each).nbytes for each in blocks.written)
    return 4 * stored + 64 * max(_CHUNK, blocks.size)
