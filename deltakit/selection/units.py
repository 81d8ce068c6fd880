"""Structured masks: tensors cut into pieces (rows, columns, heads, blocks) that are taken whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import BudgetError, ConfigError
from deltakit.formats.seeded import philox_words
from deltakit.selection.allocation import seats
from deltakit.selection.methods import Candidate, Chosen, Scene, Start, refuse_marks
from deltakit.targets.roles import is_a

if TYPE_CHECKING:
    import torch

ORDERS = ("random", "first", "last")


@dataclass(frozen=True)
class Units:
    """The pieces of one tensor. order: piece numbers, int64, first taken first. indices: piece
    number -> the flat indices of its elements, int64, sorted."""

    order: Array
    indices: Callable[[int], Array]


NONE = Units(np.zeros(0, np.int64), lambda unit: np.zeros(0, np.int64))


def check_order(order: str) -> None:
    """Raise ConfigError for what is no order of pieces."""
    if order not in ORDERS:
        raise ConfigError(f"unknown order {order!r}; known: {', '.join(ORDERS)}")


def ordered(count: int, order: str, seed: int, key: str, stream: str) -> Array:
    """Piece numbers 0..count-1 in the order in which they are taken, int64 [count].

    "random" is drawn from `seed` for this key (a tensor's name) and stream (the kind of piece).
    """
    if order == "first":
        return np.arange(count)
    if order == "last":
        return np.arange(count)[::-1]
    return np.argsort(philox_words(seed, key, count, stream), kind="stable")


def take_units(scene: Scene, budget: int, units: Sequence[Units], what: str) -> Start:
    """The support of exactly `budget` entries made of pieces, one `Units` per target.

    Tensors take turns in proportion to their number of pieces, so each gives the same share of its
    elements. The piece that reaches the budget is cut: its first elements are taken. Entries that
    must not be chosen are left out of their pieces. Raises BudgetError when the pieces do not hold
    the budget.
    """
    refuse_marks(scene, budget, f"a mask of {what}")
    left = wanted = scene.left(budget)
    blocked = [target.blocked() for target in scene.targets]
    counts = [len(u.order) for u in units]
    # A piece may turn out empty, but no more of them than there are blocked entries.
    turns = seats(counts, counts, min(sum(counts), wanted + sum(map(len, blocked))))
    parts: list[list[Array]] = [[] for _ in units]
    at = [0] * len(units)
    for number in turns.tolist():
        if not left:
            break
        piece = units[number].indices(int(units[number].order[at[number]]))
        at[number] += 1
        piece = _without(piece, blocked[number])[:left]
        parts[number].append(piece)
        left -= len(piece)
    if left:
        raise BudgetError(
            f"budget {budget} cannot be met: the {what} of the targets hold {wanted - left} of the "
            f"{wanted} entries still to choose"
        )
    made = zip(scene.targets, parts, strict=True)
    return Start(support=[_chosen(target, pieces) for target, pieces in made if pieces])


def output_axis(target: Candidate, model: torch.nn.Module | None) -> int:
    """The axis of output features of a weight: 0, but 1 in `Conv1D` and transposed convolutions."""
    path = target.live_name.rpartition(".")[0]
    owner: Any = model.get_submodule(path) if model is not None else None
    turned = ("Conv1D", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
    return 1 if len(target.shape) > 1 and is_a(owner, *turned) else 0


def slices(shape: tuple[int, ...], axis: int) -> Callable[[int], Array]:
    """Coordinate along an axis -> the flat indices of that slice, int64, sorted."""
    inner = int(np.prod(shape[axis + 1 :], dtype=np.int64))
    outer = int(np.prod(shape[:axis], dtype=np.int64))
    starts = np.arange(outer)[:, None] * (shape[axis] * inner) + np.arange(inner)
    flat = starts.reshape(-1)
    return lambda coordinate: flat + coordinate * inner


def _without(piece: Array, blocked: Array) -> Array:
    if not len(blocked):
        return piece
    near = blocked[np.minimum(np.searchsorted(blocked, piece), len(blocked) - 1)]
    return np.asarray(piece[near != piece])


def _chosen(target: Candidate, pieces: Sequence[Array]) -> Chosen:
    return Chosen(target.number, np.sort(np.concatenate(pieces), kind="stable"))
