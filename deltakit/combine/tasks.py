"""The deltas to be stacked as task vectors, and several of them side by side on one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from deltakit.delta import TensorDelta, in_tensor_order
from deltakit.differences import changes_of
from deltakit.dtypes import Array
from deltakit.errors import DeltaError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.merging.arithmetic import Contribution


class Vector(NamedTuple):
    """Changes to one tensor: int64 indices [n], sorted; float32 (or float64) values [n]."""

    indices: Array
    values: Array


Vectors = Mapping[str, Vector]  # a task vector: tensor name -> its changes


class Task(NamedTuple):
    """One delta: its position, its tensors that have entries, and a weight for every tensor."""

    number: int
    tensors: Mapping[str, TensorDelta]
    weights: Mapping[str, float]

    def vectors(self) -> dict[str, Vector]:
        """Tensor name -> the changes other than zero.

        Raises DeltaError for `set` entries whose change is not known, not finite or not defined.
        """
        return {name: _vector(tensor) for name, tensor in self.tensors.items()}


class Part(NamedTuple):
    """One delta's changes to a tensor, placed in a union.

    number: of the delta. place: positions in the union's indices, int64 [n], rising. values: [n].
    weight: of the delta in this tensor.
    """

    number: int
    place: Array
    values: Array
    weight: float

    @property
    def weighted(self) -> Array:
        """weight * values, rounded once to the dtype of the values."""
        return np.asarray(self.values.dtype.type(self.weight) * self.values)


@dataclass(frozen=True, slots=True)
class Union:
    """Changes of several deltas to one tensor, on the union of their supports.

    indices: int64 [u], sorted. parts: one for each delta with changes here, in the order given.
    dtype: of values and of sums.
    """

    indices: Array
    parts: Sequence[Part]
    dtype: np.dtype[Any]

    def total(self, terms: Iterable[Any]) -> Array:
        """0 + term + term + ... [u], in the order of the deltas; one term [n] for each part."""
        total = np.zeros(len(self.indices), self.dtype)
        for part, term in zip(self.parts, terms, strict=True):
            total[part.place] += term
        return total

    def restricted(self, keep: Array) -> Union:
        """The union on the entries where the mask `keep` [u] is true."""
        moved = np.cumsum(keep) - 1
        parts = []
        for part in self.parts:
            inside = keep[part.place]
            place = moved[part.place[inside]]
            parts.append(part._replace(place=place, values=part.values[inside]))
        return Union(self.indices[keep], parts, self.dtype)


@dataclass(frozen=True)
class Tasks:
    """All deltas of a stack, checked to fit each other.

    base: the checkpoint, where the caller has it. total_weights: elements of the base, if known.
    progress: called with (tensors done, tensors in all). notes: what a method has to tell.
    """

    tasks: Sequence[Task]
    base: Checkpoint | None = None
    total_weights: int | None = None
    progress: Callable[[int, int], None] | None = None
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def names(self) -> list[str]:
        """The tensors that any delta changes, in tensor order."""
        return list(in_tensor_order({name: None for task in self for name in task.tensors}))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return next(task.tensors[name].shape for task in self if name in task.tensors)

    def vectors(self) -> list[dict[str, Vector]]:
        """The task vectors of all deltas."""
        return [task.vectors() for task in self]

    def contributions(self, name: str) -> list[Contribution]:
        """The deltas with entries in a tensor as a merge takes them."""
        return [Contribution(t.weights[name], t.tensors[name]) for t in self if name in t.tensors]

    def unions(self, vectors: Sequence[Vectors]) -> Iterator[tuple[str, Union]]:
        """Each tensor's name and the union of the task vectors given, one for each delta.

        A tensor in which nothing is left comes with an empty union.
        """
        names = self.names()
        for done, name in enumerate(names, 1):
            pairs = zip(self, vectors, strict=True)
            yield (
                name,
                united([(task, given[name]) for task, given in pairs if name in given], name),
            )
            if self.progress is not None:
                self.progress(done, len(names))


def united(found: Sequence[tuple[Task, Vector]], name: str) -> Union:
    """The union of the changes that several deltas make to tensor `name`."""
    merged = np.sort(np.concatenate([v.indices for _, v in found]), kind="stable")
    indices = merged[np.diff(merged, prepend=-1) != 0]
    parts = [
        Part(task.number, np.searchsorted(indices, v.indices), v.values, task.weights[name])
        for task, v in found
    ]
    return Union(indices, parts, found[0][1].values.dtype)


def _vector(tensor: TensorDelta) -> Vector:
    if tensor.kind.compute is None:
        raise DeltaError(
            f"tensor {tensor.name!r} is {tensor.dtype}, for which sums are not defined; "
            "it cannot be stacked by this method"
        )
    changes = changes_of(tensor)
    if changes is None:
        raise DeltaError(
            f"tensor {tensor.name!r} is in set mode without base values, so its changes are not "
            "known; give the base"
        )
    finite = np.isfinite(changes)
    if not finite.all():
        raise DeltaError(
            f"tensor {tensor.name!r}: the change at index {tensor.indices[~finite][0]} is not "
            "finite, so it cannot be combined with others"
        )
    there = changes != 0
    return (
        Vector(tensor.indices, changes)
        if there.all()
        else Vector(tensor.indices[there], changes[there])
    )
