"""Dense changes made sparse: the largest entries over all tensors, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod

import numpy as np

from deltakit.budget import parse_budget
from deltakit.delta import TensorDelta
from deltakit.dtypes import Array
from deltakit.errors import BudgetError, ConfigError, FormatError
from deltakit.formats.bridges.bridge import Energy, Options
from deltakit.formats.checkpoint import Checkpoint
from deltakit.truncation import top


@dataclass(frozen=True, slots=True)
class DenseChange:
    """The change of a whole tensor, computed when asked for.

    compute: gives float32 of `shape`, or flat.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    compute: Callable[[], Array]

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return prod(self.shape)


def entries_to_keep(
    changes: Sequence[DenseChange], options: Options, base: Checkpoint | None
) -> int:
    """How many entries of `changes` the options ask for.

    Raises ConfigError unless exactly one of budget and density is given, and BudgetError for one
    that cannot be read.
    """
    if (options.budget is None) == (options.density is None):
        raise ConfigError(
            "a low-rank change touches every weight of its tensors; say how many entries to keep, "
            "by a budget (--budget 100k) or a density of the changed tensors (--density 0.01)"
        )
    if options.budget is not None:
        return parse_budget(options.budget, None if base is None else base.total_weights)
    density = options.density
    if density is None or not 0 < density <= 1:
        raise BudgetError(f"density {density} is no share; it lies above 0 and up to 1")
    return int(Fraction(str(density)) * sum(change.numel for change in changes))


def sparsified(
    changes: Sequence[DenseChange], count: int
) -> tuple[dict[str, TensorDelta], dict[str, Energy]]:
    """The `count` largest entries by |change| over all tensors, and each tensor's energy.

    Exactly min(count, changes that are not zero) entries; equal ones in the order of the tensors as
    given, then of their indices. Beside one dense tensor it holds at most 3 * count entries.
    Raises FormatError for a change that is not finite.
    """
    pool: list[tuple[Array, Array]] = []  # flat indices int64 and changes, by tensor
    whole, least = [], np.float32(0)
    for change in changes:
        flat = np.ascontiguousarray(change.compute(), np.float32).reshape(-1)
        if flat.size != change.numel or not np.isfinite(flat).all():
            raise FormatError(
                f"tensor {change.name!r}: its change has {flat.size} values, expected "
                f"{change.numel} finite ones for shape {list(change.shape)}"
            )
        whole.append(_energy(flat))
        size = np.abs(flat)
        at = np.flatnonzero((size >= least) & (size > 0))
        at = at[top(size[at], count)]
        pool.append((at, flat[at]))
        if sum(len(indices) for indices, _ in pool) > 2 * count:
            pool, least = _largest(pool, count)
    pool, _ = _largest(pool, count)
    kept = zip(changes, pool, whole, strict=True)
    tensors, energy = {}, {}
    for change, (indices, values), squares in kept:
        energy[change.name] = Energy(whole=squares, kept=_energy(values))
        if len(indices):
            tensors[change.name] = TensorDelta(
                name=change.name,
                shape=change.shape,
                dtype=change.dtype,
                mode="add",
                indices=indices,
                values=values,
            )
    return tensors, energy


def _largest(
    pool: list[tuple[Array, Array]], count: int
) -> tuple[list[tuple[Array, Array]], np.float32]:
    """The `count` largest entries of the pool, and the least size among them."""
    sizes = np.abs(np.concatenate([values for _, values in pool] or [np.zeros(0, np.float32)]))
    keep = top(sizes, count)
    parts = np.split(keep, np.cumsum([len(indices) for indices, _ in pool])[:-1])
    kept = [(i[part], v[part]) for (i, v), part in zip(pool, parts, strict=False)]
    least = np.float32(0) if keep.all() else sizes[keep].min(initial=np.inf)
    return kept, np.float32(least)


def _energy(values: Array) -> float:
    wide = values.astype(np.float64)
    return float(np.dot(wide, wide))
