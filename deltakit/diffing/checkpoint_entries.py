"""Where two checkpoints differ, tensor by tensor: entries, new rows and new tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltakit.delta import TensorDelta
from deltakit.diffing.grown_rows import appended_to, has_grown, rows_name
from deltakit.diffing.tied import tied
from deltakit.dtypes import DTYPES, Array
from deltakit.errors import CoordinateError, DeltaError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.safetensors_file import TensorInfo

CHUNK = 2**20  # elements of either side that are compared at a time
# What differs in config.json for reasons other than the weights.
_UNRELATED = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"}


@dataclass(frozen=True, slots=True)
class Sides:
    """A base and its tuned form, matched by tensor names.

    shared: tensors of both, in tensor order. grown: those of them that have more rows in the tuned
    form. added: tensors that only the tuned form has. lacking: those that only the base has. tied:
    tensors that the tuned form has twice, and the base once (see `deltakit.diffing.tied`).
    """

    base: Checkpoint
    tuned: Checkpoint
    shared: tuple[str, ...]
    grown: tuple[str, ...]
    added: tuple[str, ...]
    lacking: tuple[str, ...]
    tied: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors that may be in the delta: those of both, then the new ones."""
        return self.shared + self.added

    def numel(self, name: str) -> int:
        """Elements that are compared, or taken over, of one of `names`."""
        return self.tuned.tensors[name].numel

    def entries(self, name: str) -> TensorDelta | None:
        """A shared tensor as set entries with the base's bits beside; None where nothing differs.

        Rows that only the tuned form has are left out. Raises DeltaError for a tensor that differs
        in a dtype that deltakit cannot read.
        """
        info = self.base.tensors[name]
        if info.dtype not in DTYPES:
            self._require_equal(info)
            return None
        indices, before, after = self._differing(info)
        if not indices.size:
            return None
        return TensorDelta(
            name=name,
            shape=info.shape,
            dtype=info.dtype,
            mode="set",
            indices=indices,
            values=after,
            base_values=before,
        )

    def extra(self, name: str) -> tuple[str, Array] | None:
        """Name and content of what is kept whole of a tensor: a new one, or the new rows of one
        that has grown; None for others."""
        if name in self.added:
            info = self.tuned.tensors[name]
            return name, self.tuned.read(name).view(info.kind.numpy).reshape(info.shape)
        if name not in self.grown:
            return None
        before = self.base.tensors[name]
        rows = self.tuned.read(name, before.numel).view(before.kind.numpy)
        return rows_name(name, before.shape[0]), rows.reshape(-1, *before.shape[1:])

    def config_changes(self) -> dict[str, Any]:
        """What the tuned form's config.json says otherwise, but for what has nothing to do with
        weights (dtype, versions, where it was loaded from)."""
        before, after = self.base.config() or {}, self.tuned.config() or {}
        return {
            key: value
            for key, value in after.items()
            if key not in _UNRELATED and (key not in before or before[key] != value)
        }

    def config_kept(self) -> list[str]:
        """Keys of the base's config.json that the tuned form's lacks. A delta cannot remove them:
        null is a value like any other there."""
        after = self.tuned.config()
        if after is None:
            return []
        gone = (self.base.config() or {}).keys() - after.keys() - _UNRELATED
        return sorted(gone)

    def _differing(self, info: TensorInfo) -> tuple[Array, Array, Array]:
        """Flat indices of the words that differ, int64 [nnz], and the words of both, [nnz].

        Rows at the end of the tuned tensor do not move the flat indices of those before.
        """
        words = info.kind.words
        found = [(np.empty(0, np.int64), np.empty(0, words), np.empty(0, words))]
        for start in range(0, info.numel, CHUNK):
            stop = min(start + CHUNK, info.numel)
            before = self.base.read(info.name, start, stop)
            after = self.tuned.read(info.name, start, stop)
            places = np.flatnonzero(before != after)
            if places.size:
                found.append((places + start, before[places], after[places]))
        indices, old, new = (np.concatenate(column) for column in zip(*found, strict=True))
        return indices, old, new

    def _require_equal(self, info: TensorInfo) -> None:
        pairs = zip(_blocks(info), _blocks(self.tuned.tensors[info.name]), strict=False)
        if info.name in self.grown or any(a != b for a, b in pairs):
            raise DeltaError(
                f"tensor {info.name!r} differs, and its dtype {info.dtype} is not supported"
            )


def match(base: Checkpoint, tuned: Checkpoint, *, ignore_missing: bool = False) -> Sides:
    """The two checkpoints tensor by tensor, checked by their headers, and read where ties may be.

    Raises CoordinateError for tensors that `tuned` lacks (unless ignored) or has in a shape that
    is not the base's with rows appended, and DeltaError for tensors of another dtype.
    """
    lacking = tuple(name for name in base.names if name not in tuned.tensors)
    if lacking and not ignore_missing:
        listed = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
        raise CoordinateError(
            f"{tuned.path} lacks {len(lacking)} tensors of {base.path}: {listed}; "
            "missing='ignore' (--ignore-missing) leaves them as they are in the base"
        )
    shared = tuple(name for name in base.names if name in tuned.tensors)
    grown = tuple(name for name in shared if _has_grown(base, tuned, name))
    added = tuple(name for name in tuned.names if name not in base.tensors)
    twins = tuple(tied(base, tuned, shared, added))
    added = tuple(name for name in added if name not in twins)
    for name in added:
        if appended_to(name) is not None:
            raise DeltaError(
                f"{tuned.path} has a tensor called {name!r}, a name that deltas give to rows "
                "appended to a tensor; rename it"
            )
    return Sides(base, tuned, shared, grown, added, lacking, twins)


def _has_grown(base: Checkpoint, tuned: Checkpoint, name: str) -> bool:
    before, after = base.tensors[name], tuned.tensors[name]
    if before.dtype != after.dtype:
        raise DeltaError(
            f"tensor {name!r} is {before.dtype} in {base.path} and {after.dtype} in {tuned.path}; "
            "convert one of them first, so that both are stored alike"
        )
    grown = has_grown(before.shape, after.shape)
    if before.shape != after.shape and not grown:
        raise CoordinateError(
            f"tensor {name!r} has shape {list(before.shape)} in {base.path} and "
            f"{list(after.shape)} in {tuned.path}; a delta can only append rows"
        )
    return grown


def _blocks(info: TensorInfo) -> Iterator[bytes]:
    with info.file.open("rb") as file:
        file.seek(info.offset)
        for start in range(0, info.nbytes, CHUNK):
            yield file.read(min(CHUNK, info.nbytes - start))
