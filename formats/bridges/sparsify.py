"""Dense changes made sparse: the largest entries over all tensors, one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from typing import NamedTuple

import numpy as np

from deltakit.budget import parse_budget
from deltakit.delta import TensorDelta
from deltakit.dtypes import Array
from deltakit.errors import BudgetError, ConfigError, FormatError
from deltakit.formats.bridges.bridge import Energy, Options
from deltakit.formats.checkpoint import Checkpoint
from deltakit.truncation import top

_CHUNK = 2**20  # values looked at together, so that what is needed beside a dense change is small


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
        return math.prod(self.shape)


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
    changes: Sequence[DenseChange],
    count: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, TensorDelta], dict[str, Energy]]:
    """The `count` largest entries by |change| over all tensors, and each tensor's energy.

    Exactly min(count, changes that are not zero) entries; equal ones in the order of the tensors as
    given, then of their indices. Beside one dense tensor it holds at most 3 * count entries.
    progress: called with (tensors done, tensors in all). Raises FormatError for a change that is not
    finite.
    """
    pool: list[_Part] = []
    whole: list[float] = []
    least = np.float32(0)
    for owner, change in enumerate(changes):
        flat = np.ascontiguousarray(change.compute(), np.float32).reshape(-1)
        if flat.size != change.numel:
            raise FormatError(
                f"tensor {change.name!r}: its change has {flat.size} values, expected "
                f"{change.numel} for shape {list(change.shape)}"
            )
        squares = []
        for start in range(0, flat.size, _CHUNK):
            piece = flat[start : start + _CHUNK]
            squares.append(_energy(piece))
            if not math.isfinite(squares[-1]):
                raise FormatError(f"tensor {change.name!r}: its change is not finite")
            at = np.flatnonzero((np.abs(piece) >= least) & (piece != 0))
            at = at[top(np.abs(piece[at]), count)]
            pool.append(_Part(owner, at + start, piece[at]))
            if sum(len(part.indices) for part in pool) > 2 * count:
                pool, least = _largest(pool, count)
        whole.append(math.fsum(squares))
        if progress is not None:
            progress(len(whole), len(changes))
    pool, _ = _largest(pool, count)
    tensors = {}
    energy = {c.name: Energy(whole=w, kept=0.0) for c, w in zip(changes, whole, strict=True)}
    for owner, parts in groupby(pool, key=lambda part: part.owner):
        change, mine = changes[owner], list(parts)
        values = np.concatenate([part.values for part in mine])
        energy[change.name] = Energy(whole=whole[owner], kept=_energy(values))
        if values.size:
            tensors[change.name] = TensorDelta(
                name=change.name,
                shape=change.shape,
                dtype=change.dtype,
                mode="add",
                indices=np.concatenate([part.indices for part in mine]),
                values=values,
            )
    return tensors, energy


class _Part(NamedTuple):
    """Entries of one stretch of the tensor number `owner`: flat indices int64, and changes."""

    owner: int
    indices: Array
    values: Array


def _largest(pool: list[_Part], count: int) -> tuple[list[_Part], np.float32]:
    """The `count` largest entries of the pool, and the least size among them."""
    sizes = np.abs(np.concatenate([part.values for part in pool] or [np.zeros(0, np.float32)]))
    keep = top(sizes, count)
    marks = np.split(keep, np.cumsum([len(part.indices) for part in pool])[:-1])
    kept = [
        _Part(part.owner, part.indices[mark], part.values[mark])
        for part, mark in zip(pool, marks, strict=False)
        if mark.any()
    ]
    return kept, sizes[keep].min(initial=np.inf) if not keep.all() else np.float32(0)


def _energy(values: Array) -> float:
    wide = values.astype(np.float64)
    return float(np.dot(wide, wide))
