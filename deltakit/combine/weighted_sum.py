"""The sum of weighted task vectors, the last step of half of the methods."""

from __future__ import annotations

from collections.abc import Sequence

from deltakit.combine.tasks import Tasks, Vector, Vectors


def weighted_sum(tasks: Tasks, vectors: Sequence[Vectors]) -> dict[str, Vector]:
    """0 + w_1 v_1 + w_2 v_2 + ... per entry, in the order of the deltas, never fused."""
    return {
        name: Vector(union.indices, union.total(part.weighted for part in union.parts))
        for name, union in tasks.unions(vectors)
    }
