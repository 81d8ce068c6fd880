"""The data model: a sparse delta is a sorted set of entries per tensor, and little else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deltakit.adapter import Adapter
from deltakit.dtypes import Array, DType, dtype, dtype_of
from deltakit.errors import DeltaError

if TYPE_CHECKING:
    from deltakit.publishing.push_report import PushReport

Mode = Literal["add", "set"]
MAX_NUMEL = 2**62  # keeps every sum of an index and a length inside int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Two short digests of a base tensor's values, cast to the dtype the delta was trained in.

    `sample` covers up to 1,024 positions drawn from the tensor's name and shape alone; `support`
    covers the delta's own indices (None where the writer had no base, or after truncation).
    Both are 16 lower-case hexadecimal digits.
    """

    sample: str
    support: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseIdentity:
    """Which checkpoint a delta belongs to.

    `total_weights` counts all elements of the base, so that "0.1%" keeps its meaning.
    """

    model_id: str | None = None
    revision: str | None = None
    total_weights: int | None = None
    tensors: Mapping[str, Fingerprint] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorDelta:
    """The entries of one tensor.

    name: the tensor's name in the base checkpoint. shape: the base tensor's shape.
    dtype: the base tensor's dtype on disk ("bfloat16"). mode: "add" (W + v) or "set" (W becomes v).
    indices: int64 [nnz], flat row-major, strictly increasing.
    values: [nnz]; add: float32 (float64 for float64 tensors), all finite; set: the raw bits as
    unsigned integers of the dtype's width. Given floats of the dtype itself, set takes their bits.
    order: int64 [nnz] or None, the step at which each entry was unmasked.
    base_values: [nnz] or None, the base's raw bits at the indices, as for set.
    trained_dtype: the dtype the weights had in training; the dtype on disk by default.
    seed: the seed that generates this support (see `deltakit.formats.seeded`), or None.

    Raises DeltaError when any of this does not hold.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    mode: Mode
    indices: Array
    values: Array
    order: Array | None = None
    base_values: Array | None = None
    trained_dtype: str = ""
    seed: int | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "shape", tuple(int(n) for n in self.shape))
        put(self, "trained_dtype", self.trained_dtype or self.dtype)
        dtype(self.trained_dtype)
        if any(n < 0 for n in self.shape) or self.numel > MAX_NUMEL:
            raise DeltaError(f"tensor {self.name!r}: shape {list(self.shape)} is not possible")
        put(self, "indices", self._checked_indices())
        put(self, "values", self._checked_values())
        if self.order is not None:
            put(self, "order", self._checked_order(self.order))
        if self.base_values is not None:
            put(self, "base_values", self._as_words(self.base_values, "base_values"))

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape)

    @property
    def nnz(self) -> int:
        """Entries in the delta."""
        return len(self.indices)

    @property
    def kind(self) -> DType:
        """The base tensor's dtype, resolved."""
        return dtype(self.dtype)

    def floats(self) -> Array:
        """Values as float32 (float64 for float64 tensors): differences (add) or weights (set)."""
        if self.mode == "add":
            return self.values
        return np.asarray(self.values.view(self.kind.numpy).astype(self.kind.compute or np.float64))

    def magnitudes(self) -> Array:
        """|change| per entry, [nnz]: |v| for add, |v - base| for set.

        Raises DeltaError for a set tensor that does not carry its base values.
        """
        if self.mode == "add":
            return np.asarray(np.abs(self.values))
        if self.base_values is None:
            raise DeltaError(
                f"tensor {self.name!r} is in set mode without base values, so the size of its "
                "changes is not known; give the base"
            )
        base = self.base_values.view(self.kind.numpy)
        return np.asarray(np.abs(self.floats() - base.astype(self.kind.compute or np.float64)))

    def take(self, keep: Array) -> TensorDelta:
        """The delta of the entries at positions `keep` (sorted positions or a boolean mask)."""
        return TensorDelta(
            name=self.name,
            shape=self.shape,
            dtype=self.dtype,
            mode=self.mode,
            indices=self.indices[keep],
            values=self.values[keep],
            order=None if self.order is None else self.order[keep],
            base_values=None if self.base_values is None else self.base_values[keep],
            trained_dtype=self.trained_dtype,
        )

    def equals(self, other: TensorDelta) -> bool:
        """Bitwise equality of everything, the generator of the support included."""
        mine, theirs = self._compared(), other._compared()
        arrays = zip(mine[1], theirs[1], strict=True)
        return mine[0] == theirs[0] and all(_same_bits(a, b) for a, b in arrays)

    def _compared(self) -> tuple[tuple[Any, ...], tuple[Array | None, ...]]:
        plain = (self.name, self.shape, self.dtype, self.mode, self.trained_dtype, self.seed)
        return plain, (self.indices, self.values, self.order, self.base_values)

    def _checked_indices(self) -> Array:
        given = np.asarray(self.indices)
        if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size):
            raise DeltaError(
                f"tensor {self.name!r}: indices must be integers of shape [nnz], "
                f"found {given.dtype} of shape {list(given.shape)}"
            )
        if given.dtype == np.uint64 and given.size and int(given.max()) > MAX_NUMEL:
            raise DeltaError(f"tensor {self.name!r}: index {given.max()} is out of range")
        indices = np.ascontiguousarray(given, dtype=np.int64)
        if not indices.size:
            return indices
        if indices.min() < 0 or indices.max() >= self.numel:
            bad = indices[(indices < 0) | (indices >= self.numel)][0]
            raise DeltaError(
                f"tensor {self.name!r}: index {bad} is out of range for {self.numel} elements"
            )
        if (indices[1:] <= indices[:-1]).any():
            at = int(np.flatnonzero(indices[1:] <= indices[:-1])[0]) + 1
            what = "twice" if indices[at] == indices[at - 1] else "out of order"
            raise DeltaError(
                f"tensor {self.name!r}: index {indices[at]} stands {what} at position {at}; "
                "indices must be strictly increasing"
            )
        return indices

    def _checked_values(self) -> Array:
        if self.mode == "set":
            return self._as_words(self.values, "values")
        if self.mode != "add":
            raise DeltaError(f"tensor {self.name!r}: mode must be add or set, found {self.mode!r}")
        compute = self.kind.compute
        if compute is None:
            raise DeltaError(
                f"tensor {self.name!r}: add is not defined for {self.dtype}; use set mode"
            )
        values = np.ascontiguousarray(self.values, dtype=compute)
        self._check_length(values, "values")
        finite = np.isfinite(values)
        if not finite.all():
            at = int(np.flatnonzero(~finite)[0])
            raise DeltaError(
                f"tensor {self.name!r}: value {values[at]} at index {self.indices[at]} is not "
                "finite; add mode holds finite values only"
            )
        return values

    def _as_words(self, given: Any, what: str) -> Array:
        array = np.ascontiguousarray(given)
        self._check_length(array, what)
        if array.dtype in (self.kind.numpy, self.kind.words):
            return array.view(self.kind.words)
        raise DeltaError(
            f"tensor {self.name!r}: {what} must be raw bits ({self.kind.words}) or {self.dtype}, "
            f"found {array.dtype}"
        )

    def _checked_order(self, given: Any) -> Array:
        order = np.ascontiguousarray(given, dtype=np.int64)
        self._check_length(order, "order")
        if order.size and order.min() < 0:
            raise DeltaError(f"tensor {self.name!r}: order holds a negative step")
        return order

    def _check_length(self, array: Array, what: str) -> None:
        if array.shape != self.indices.shape:
            raise DeltaError(
                f"tensor {self.name!r}: {what} have shape {list(array.shape)}, "
                f"expected {list(self.indices.shape)} to match the indices"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SparseDelta:
    """The sparse difference to a base checkpoint.

    tensors: name -> TensorDelta, kept in bytewise order of the names.
    extras: name -> whole array that the base lacks or that was trained densely.
    base: identity of the base, or None. config: changes to the base's config.json that the extras
    need ({"num_labels": 3}). provenance: free JSON about how the delta came to be.
    adapter: the adapter whose tensors `tensors` are, or None where they are the base's own.

    Raises DeltaError when names do not match, a name is both a tensor and an extra, or a tensor is
    none of the adapter's.
    """

    tensors: Mapping[str, TensorDelta]
    extras: Mapping[str, Array] = field(default_factory=dict)
    base: BaseIdentity | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if name != tensor.name:
                raise DeltaError(f"tensor {tensor.name!r} stands under the name {name!r}")
            if self.adapter is not None:
                self.adapter.split(name)
        both = sorted(set(self.tensors) & set(self.extras))
        if both:
            raise DeltaError(f"{both[0]!r} is both a sparse tensor and an extra")
        for array in self.extras.values():
            dtype_of(array)
        for name in ("tensors", "extras"):
            value = getattr(self, name)
            object.__setattr__(self, name, MappingProxyType(in_tensor_order(value)))

    @property
    def nnz(self) -> int:
        """Entries over all tensors; extras are not counted."""
        return sum(t.nnz for t in self.tensors.values())

    @property
    def extra_weights(self) -> int:
        """Elements of all extras, reported beside the budget."""
        return sum(a.size for a in self.extras.values())

    @classmethod
    def from_hub(
        cls, repo: str, *, revision: str | None = None, budget: int | str | None = None
    ) -> SparseDelta:
        """The delta of a repository of the Hub, downloaded into the cache and checked.

        repo: "owner/name" or `hf://owner/name[@revision][/file]`. revision: a branch, tag or commit.
        budget: the delta of the family that has exactly so many entries. See `deltakit.pull`, which
        writes a file.
        """
        from deltakit.publishing.pull import read

        return read(repo, revision=revision, budget=budget)

    def push_to_hub(self, repo_id: str, **options: Any) -> PushReport:
        """Publish this delta as delta.sdelta of a repository, with a card; one commit, or none.

        repo_id, options and errors: those of `deltakit.push`.
        """
        from pathlib import Path
        from tempfile import TemporaryDirectory

        from deltakit.formats.sdelta import save
        from deltakit.publishing.push import push

        with TemporaryDirectory() as folder:
            file = Path(folder, "delta.sdelta")
            save(self, file)
            return push(file, repo_id, **options)

    def equals(self, other: SparseDelta) -> bool:
        """Bitwise equality of tensors and extras, and equality of all descriptions."""
        if list(self.tensors) != list(other.tensors) or list(self.extras) != list(other.extras):
            return False
        if not all(t.equals(other.tensors[n]) for n, t in self.tensors.items()):
            return False
        if not all(_same_bits(a, other.extras[n]) for n, a in self.extras.items()):
            return False
        same = (self.base, dict(self.config), dict(self.provenance), self.adapter)
        return same == (other.base, dict(other.config), dict(other.provenance), other.adapter)


def in_tensor_order(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping sorted bytewise by name, the order that deltakit uses everywhere.

    Raises DeltaError for a name that has no UTF-8 form (a lone surrogate).
    """
    try:
        return {name: mapping[name] for name in sorted(mapping, key=lambda n: n.encode())}
    except UnicodeEncodeError as error:
        raise DeltaError(f"the name {error.object!r} cannot be written as UTF-8") from None


def _same_bits(a: Array | None, b: Array | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
