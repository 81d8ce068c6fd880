"""Concatenation of deltas that do not touch each other's entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from deltakit.combine.linear import Linear
from deltakit.combine.method import METHODS, Flavours
from deltakit.combine.tasks import Task, Tasks
from deltakit.delta import TensorDelta
from deltakit.dtypes import Array
from deltakit.errors import DeltaError


@METHODS.register("disjoint", "concatenation; entries that two deltas have are refused and told")
@dataclass(frozen=True, kw_only=True)
class Disjoint(Linear):
    """tau = w_t tau_t for the one t that has the entry: `linear`, and nothing is summed.

    collisions: entries that several deltas have are refused, with their number by tensor ("error"),
    or taken from the "first" or the "last" delta that has them. Entries count whatever their value.
    """

    flavours: ClassVar[Flavours] = {}

    collisions: Literal["error", "first", "last"] = "error"

    def stack(self, tasks: Tasks) -> dict[str, TensorDelta]:
        found = collisions(tasks)
        if found:
            worst = sorted(found, key=lambda name: -found[name])[:3]
            told = ", ".join(f"{name!r}: {found[name]:,}" for name in worst)
            report = (
                f"{sum(found.values()):,} entries in {len(found)} tensors are in several deltas "
                f"({told}{', ...' if len(found) > 3 else ''})"
            )
            if self.collisions == "error":
                raise DeltaError(
                    f"{report}; take the first or the last of them (collisions), or another method"
                )
            tasks.notes.append(f"{report}; taken from the {self.collisions}")
            tasks = replace(tasks, tasks=_without_repeats(tasks.tasks, self.collisions == "last"))
        return super().stack(tasks)


def collisions(tasks: Tasks) -> dict[str, int]:
    """Tensor name -> how many entries several deltas have, where any."""
    found = {}
    for name in tasks.names():
        held = [c.delta.indices for c in tasks.contributions(name)]
        merged = np.sort(np.concatenate(held), kind="stable")
        again = merged[1:] == merged[:-1]
        repeats = again & ~np.append(False, again[:-1])  # the third of an index is no new one
        if repeats.any():
            found[name] = int(np.count_nonzero(repeats))
    return found


def _without_repeats(tasks: Sequence[Task], backwards: bool) -> list[Task]:
    """The deltas without the entries that an earlier (or, `backwards`, a later) one has."""
    taken: dict[str, Array] = {}
    made = []
    for task in reversed(tasks) if backwards else tasks:
        tensors = {}
        for name, tensor in task.tensors.items():
            before = taken.get(name, np.zeros(0, np.int64))
            fresh = tensor.take(~np.isin(tensor.indices, before, assume_unique=True))
            taken[name] = np.union1d(before, fresh.indices)
            tensors[name] = fresh
        made.append(task._replace(tensors=tensors))
    return made[::-1] if backwards else made
