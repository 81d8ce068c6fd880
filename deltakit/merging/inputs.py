"""The deltas of a merge as one: weights, the extras and configuration changes they agree on."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from deltakit.adapters.initial import STORED
from deltakit.delta import SparseDelta
from deltakit.dtypes import Array
from deltakit.errors import ConfigError, DeltaError
from deltakit.formats import header_json
from deltakit.formats.header_json import digest as header_digest
from deltakit.formats.sdelta import SdeltaFile
from deltakit.hub.locate import named_after
from deltakit.lineage import digest
from deltakit.merging.arithmetic import Contribution
from deltakit.merging.outlines import read_tensors

Given = SparseDelta | str | os.PathLike[str]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Input:
    """One delta of a merge: what messages call it, its file if it has one, and its weight.

    file: the file that it was read from, closed. elsewhere: tensors whose entries were not read, as
    other jobs merge them; they stand in `delta` without entries.
    """

    label: str
    path: Path | None
    delta: SparseDelta
    weight: float
    file: SdeltaFile | None = None
    elsewhere: frozenset[str] = frozenset()

    @property
    def extras(self) -> dict[str, Array]:
        """The delta's extras that belong into a merged model: initial values of an adapter do not."""
        if self.delta.adapter is None:
            return dict(self.delta.extras)
        return {n: a for n, a in self.delta.extras.items() if not n.startswith(STORED)}

    def digest(self) -> str:
        """Text that differs once the delta's content does, whatever part of it was read."""
        if self.file is None:
            return digest(self.delta)
        return header_digest(header_json.dumps(self.file.header).encode())

    def holds_entries(self, name: str) -> bool:
        """Whether the delta has entries in one of its tensors, read or not."""
        return name in self.elsewhere or self.delta.tensors[name].nnz > 0


def read_inputs(
    deltas: Given | Sequence[Given],
    weights: Sequence[float] | None = None,
    *,
    outlines: bool = False,
) -> list[Input]:
    """Load the deltas of a merge, in order; weights are 1 by default.

    outlines: leave the entries of those that are files to `with_entries`. Raises ConfigError when there is no delta, and when the weights are not as many as the deltas
    or not finite.
    """
    given = [deltas] if isinstance(deltas, (SparseDelta, str, os.PathLike)) else list(deltas)
    if not given:
        raise ConfigError("no delta to merge")
    factors = [1.0] * len(given) if weights is None else [float(w) for w in weights]
    if len(factors) != len(given):
        raise ConfigError(f"{len(factors)} weights for {len(given)} deltas; give one for each")
    for factor in factors:
        if not math.isfinite(factor):
            raise ConfigError(f"weight {factor} is not finite")
    inputs = []
    for number, (item, factor) in enumerate(zip(given, factors, strict=True)):
        if isinstance(item, SparseDelta):
            inputs.append(Input(f"delta {number}", None, item, factor))
        else:
            with SdeltaFile(item) as file:
                delta, elsewhere = read_tensors(file, frozenset() if outlines else None)
            path = named_after(item, ".sdelta")
            inputs.append(Input(str(item), path, delta, factor, file, elsewhere))
    return inputs


def contributions(inputs: Sequence[Input]) -> dict[str, list[Contribution]]:
    """Tensor name -> the deltas of base weights that have entries in it, in the order of the merge."""
    found: dict[str, list[Contribution]] = {}
    for each in inputs:
        if each.delta.adapter is not None:  # see `deltakit.merging.folding`
            continue
        for name, tensor in each.delta.tensors.items():
            if each.holds_entries(name):
                found.setdefault(name, []).append(Contribution(each.weight, tensor))
    return found


def chosen_head(inputs: Sequence[Input], head: int | str | Path | None) -> int | None:
    """The position of the delta that `head` names by position or by path; None for None."""
    if head is None:
        return None
    for number, each in enumerate(inputs):
        if each.path is not None and not isinstance(head, int) and Path(each.label) == Path(head):
            return number
    if str(head).lstrip("-").isdecimal():
        if 0 <= int(str(head)) < len(inputs):
            return int(str(head))
        raise ConfigError(f"head {head} is out of range: {len(inputs)} deltas, counted from 0")
    known = ", ".join(each.label for each in inputs)
    raise ConfigError(f"head {str(head)!r} is none of the deltas; they are: {known}")


def common_extras(inputs: Sequence[Input], head: int | None) -> dict[str, Array]:
    """All extras by name; where deltas differ, the one of the delta at position `head`.

    Raises DeltaError for extras that differ and are not settled by `head`, and for a name that is
    an extra of one delta and has entries in another.
    """
    extras = _agreed("extra", [each.extras for each in inputs], inputs, head, _same_array)
    for each in inputs:
        tensors = {} if each.delta.adapter is not None else each.delta.tensors
        both = [name for name in tensors if name in extras and each.holds_entries(name)]
        if both:
            raise DeltaError(
                f"{both[0]!r} is a whole extra in one delta and has single entries in "
                f"{each.label}; the two cannot be merged"
            )
    return extras


def common_config(inputs: Sequence[Input], head: int | None) -> dict[str, Any]:
    """All configuration changes by key; DeltaError where they differ, as for extras."""
    configs = [each.delta.config for each in inputs]
    return _agreed("configuration key", configs, inputs, head, lambda a, b: bool(a == b))


def _agreed(
    what: str,
    given: Sequence[Mapping[str, T]],
    inputs: Sequence[Input],
    head: int | None,
    same: Any,
) -> dict[str, T]:
    taken: dict[str, tuple[T, int]] = {}
    for number, mapping in enumerate(given):
        for name, value in mapping.items():
            if name not in taken:
                taken[name] = (value, number)
                continue
            first, owner = taken[name]
            if same(first, value) or (head is not None and name in given[head]):
                continue
            raise DeltaError(
                f"{what} {name!r} differs between {inputs[owner].label} and "
                f"{inputs[number].label}; choose one with head (--head FROM)"
            )
    agreed = {name: value for name, (value, _) in taken.items()}
    if head is not None:
        agreed |= given[head]
    return agreed


def _same_array(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
