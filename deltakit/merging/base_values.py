"""Comparing a base with what deltas record of it: at once, or as its weight files arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltakit.delta import SparseDelta
from deltakit.errors import DeltakitError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import check_base
from deltakit.merging.inputs import Input

if TYPE_CHECKING:
    from deltakit.merging.plan import Plan


def checked(each: Input, delta: SparseDelta, base: Checkpoint, allow: bool) -> list[str]:
    """`check_base` of an input, or of the part of it given as `delta`, told with its label."""
    try:
        return [f"{each.label}: {note}" for note in check_base(delta, base, allow=allow)]
    except DeltakitError as error:
        raise type(error)(f"{each.label}: {error}") from None


def check_arrived(plan: Plan, file: str) -> None:
    """Compare what `plan` has deferred of a weight file, given by its name, which is at hand now;
    raises as `plan_merge` does."""
    held = plan.base.shards[file].tensors
    for each in plan.deferred:
        of_file = [n for n in each.delta.tensors if plan.base.tensors[n] == held.get(n)]
        tensors = {name: each.delta.tensors[name] for name in of_file}
        part = SparseDelta(tensors=tensors, base=each.delta.base)
        found = checked(each, part, plan.base, plan.allow_base_mismatch)
        plan.notes.extend(note for note in found if note not in plan.notes)
