"""Stacking: several deltas of one base become one delta, by a method of `deltakit.combine`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deltakit.adapters.refusal import MERGE, refuse_adapters
from deltakit.combine.linear import plain
from deltakit.combine.method import Method, make_method
from deltakit.combine.tasks import Task, Tasks, Vector
from deltakit.combine.weights import Weight, checked_weights, weight_of
from deltakit.comparing.base_agreement import base_agreement, base_of
from deltakit.delta import BaseIdentity, SparseDelta, TensorDelta, in_tensor_order
from deltakit.errors import BaseMismatchError, DeltaError, DeltakitError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import check_base, identify
from deltakit.lineage import brief, digest
from deltakit.merging.inputs import (
    Given,
    Input,
    chosen_head,
    common_config,
    common_extras,
    read_inputs,
)


def stack(
    deltas: Given | Sequence[Given],
    method: str = "linear",
    weights: Sequence[Weight] | None = None,
    *,
    density: float | None = None,
    density_of: Literal["entries", "numel"] | None = None,
    trim_scope: Literal["global", "tensor"] | None = None,
    flavour: Literal["paper", "mergekit", "peft"] = "paper",
    seed: int | None = None,
    head: int | str | Path | None = None,
    base: str | Path | Checkpoint | None = None,
    allow_base_mismatch: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> SparseDelta:
    """One delta made of several, on the union of their supports, in O(entries) time and memory.

    deltas: SparseDelta objects or paths of .sdelta files, in order. method: a name of
    `deltakit.combine.METHODS`, whose class documents its formula and options; density, density_of,
    trim_scope, seed and `options` (scale, epsilon, elect, ...) are those that it takes. flavour:
    the defaults of the method's paper, or those by which a peer's own numbers come out.
    weights: one for each delta, 1 by default: a number, or a mapping from shell patterns over
    tensor names to numbers (the first that matches; "*" for the rest). Weights do not apply to
    extras. head: which delta's extras and configuration win where several differ, by position or
    path. base: the checkpoint, which every delta is then checked against; gives base values that
    `set` deltas do not carry. progress: called with (tensors done, tensors in all).

    Everything is computed in float32 (float64 for float64 tensors). `set` entries become changes
    to their recorded base values, and entries that come out as exactly 0 are dropped; `linear` and
    `disjoint`, which merge to the bits that merging all deltas at once gives, do neither.
    Provenance records the method, all its options and the sources.

    Raises ConfigError for methods, flavours, options and weights that do not exist or fit,
    BaseMismatchError for deltas of different bases (unless allowed, which is noted) and DeltaError
    for deltas that cannot be combined.
    """
    named = {"density": density, "density_of": density_of, "trim_scope": trim_scope, "seed": seed}
    given = {name: value for name, value in named.items() if value is not None}
    make_method(method, flavour, {**given, **options})  # tells mistakes before deltas are read
    return stack_inputs(
        read_inputs(deltas),
        method,
        weights,
        {**given, **options},
        flavour=flavour,
        head=head,
        base=None if base is None else base if isinstance(base, Checkpoint) else Checkpoint(base),
        allow_base_mismatch=allow_base_mismatch,
        progress=progress,
    )


def stack_inputs(
    inputs: Sequence[Input],
    method: str,
    weights: Sequence[Weight] | None,
    options: Mapping[str, Any],
    *,
    flavour: str = "paper",
    head: int | str | Path | None,
    base: Checkpoint | None,
    allow_base_mismatch: bool,
    progress: Callable[[int, int], None] | None = None,
) -> SparseDelta:
    """See `stack`."""
    refuse_adapters([each.delta.adapter for each in inputs], "stacking", MERGE)
    maker = make_method(method, flavour, options)
    notes = _check_base(inputs, base, allow_base_mismatch)
    notes += _check_agreement(inputs, allow_base_mismatch)
    chosen = chosen_head(inputs, head)
    extras, config = common_extras(inputs, chosen), common_config(inputs, chosen)
    tasks = read_tasks(inputs, weights, base, progress)
    if extras and any(factor != 1 for task in tasks for factor in task.weights.values()):
        notes.append("weights do not apply to extras, which are taken whole")
    tensors = combined(tasks, maker)
    return SparseDelta(
        tensors=tensors,
        extras=extras,
        base=_identity(inputs, tensors, base),
        config=config,
        provenance={
            "operation": "stack",
            "method": method,
            "flavour": flavour,
            "options": maker.options(),
            "sources": _sources(inputs, checked_weights(weights, len(inputs), tasks.names())),
            **({"head": chosen} if chosen is not None else {}),
            **({"notes": notes + tasks.notes} if notes + tasks.notes else {}),
        },
    )


def stacked(
    inputs: Sequence[Input],
    method: str,
    weights: Sequence[Weight] | None,
    options: Mapping[str, Any],
    base: Checkpoint | None,
    head: int | str | Path | None,
    allow_base_mismatch: bool,
) -> Input:
    """The deltas of a merge as the one that `stack` makes of them, given its options by name."""
    delta = stack_inputs(
        inputs,
        method,
        weights,
        {name: value for name, value in options.items() if name != "flavour"},
        flavour=options.get("flavour", "paper"),
        head=head,
        base=base,
        allow_base_mismatch=allow_base_mismatch,
    )
    return Input(f"{len(inputs)} deltas by {method}", None, delta, 1.0)


def _check_base(inputs: Sequence[Input], base: Checkpoint | None, allow: bool) -> list[str]:
    if base is None:
        return []
    notes = []
    for each in inputs:
        try:
            found = check_base(each.delta, base, allow=allow)
        except DeltakitError as error:
            raise type(error)(f"{each.label}: {error}") from None
        notes += [f"{each.label}: {note}" for note in found]
    return notes


def _check_agreement(inputs: Sequence[Input], allow: bool) -> list[str]:
    """Refuse tensors of different shapes or dtypes, and deltas of different bases."""
    notes = []
    seen: dict[str, tuple[TensorDelta, Input]] = {}
    for each in inputs:
        for name, tensor in each.delta.tensors.items():
            first, owner = seen.setdefault(name, (tensor, each))
            for what in ("shape", "dtype", "trained_dtype"):
                pair = [getattr(t, what) for t in (first, tensor)]
                if pair[0] != pair[1]:
                    raise DeltaError(
                        f"tensor {name!r}: {what} is {pair[0]} in {owner.label} and {pair[1]} in "
                        f"{each.label}; they cannot be stacked"
                    )
    for number, one in enumerate(inputs):
        for other in inputs[number + 1 :]:
            agreement = base_agreement(one.delta, other.delta)
            if agreement.verdict != "different":
                continue
            told = f"{one.label} and {other.label} belong to different bases: {agreement.why}"
            if not allow:
                raise BaseMismatchError(f"{told}; --allow-base-mismatch stacks them all the same")
            notes.append(f"{told}; stacked all the same, as asked")
    return notes


def read_tasks(
    inputs: Sequence[Input],
    weights: Sequence[Weight] | None,
    base: Checkpoint | None,
    progress: Callable[[int, int], None] | None = None,
) -> Tasks:
    """The deltas as a method takes them, with base values where they are known."""
    held = [
        {name: _with_base(t, base) for name, t in each.delta.tensors.items() if t.nnz}
        for each in inputs
    ]
    names = list(in_tensor_order({name: None for tensors in held for name in tensors}))
    factors = checked_weights(weights, len(inputs), names)
    tasks = [
        Task(number, tensors, {name: weight_of(factor, name) for name in names})
        for number, (tensors, factor) in enumerate(zip(held, factors, strict=True))
    ]
    totals = [each.delta.base.total_weights for each in inputs if each.delta.base is not None]
    total = next((n for n in totals if n is not None), base.total_weights if base else None)
    return Tasks(tasks, base, total, progress)


def combined(tasks: Tasks, maker: Method) -> dict[str, TensorDelta]:
    """What a method makes of the deltas, without tensors that came out empty, in tensor order."""
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused after
        made = {name: _tensor(tasks, name, m, maker) for name, m in maker.stack(tasks).items()}
    return in_tensor_order({name: tensor for name, tensor in made.items() if tensor.nnz})


def _with_base(tensor: TensorDelta, base: Checkpoint | None) -> TensorDelta:
    """The tensor, with base values read where it is `set` and carries none."""
    if base is None or tensor.mode == "add" or tensor.base_values is not None:
        return tensor
    return replace(tensor, base_values=base.gather(tensor.name, tensor.indices))


def _tensor(tasks: Tasks, name: str, made: Vector | TensorDelta, maker: Method) -> TensorDelta:
    if isinstance(made, TensorDelta):
        return made
    like = next(task.tensors[name] for task in tasks if name in task.tensors)
    values = made.values * made.values.dtype.type(maker.scale)
    left = values != 0
    return plain(like, indices=made.indices[left], values=values[left])


def _identity(
    inputs: Sequence[Input], tensors: Mapping[str, TensorDelta], base: Checkpoint | None
) -> BaseIdentity | None:
    """The base of all: told by the base itself if it is there, otherwise by the deltas."""
    known = base_of(tensors, *[each.delta for each in inputs])
    if base is None:
        return known
    dtypes = {name: tensor.trained_dtype for name, tensor in tensors.items()}
    found = identify(base, {name: tensor.indices for name, tensor in tensors.items()}, dtypes)
    if found.model_id is None and known is not None:  # a local folder does not know its name
        return replace(found, model_id=known.model_id, revision=known.revision)
    return found


def _sources(inputs: Sequence[Input], weights: Sequence[Weight]) -> list[dict[str, Any]]:
    """For each delta: the name of its file, its digest, weight, entries, and how it came to be."""
    return [
        {
            "name": each.label if each.path is None else each.path.name,
            "digest": digest(each.delta),
            "weight": dict(weight) if isinstance(weight, Mapping) else weight,
            "entries": each.delta.nnz,
            **({"provenance": brief(each.delta.provenance)} if each.delta.provenance else {}),
        }
        for each, weight in zip(inputs, weights, strict=True)
    ]
