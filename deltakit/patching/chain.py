"""Weight patches: deltas that lead from one state of a model to a later one, and say so.

A patch is a delta of `set` tensors whose provenance holds, under "chain", the step and the digest
of the whole state (see `deltakit.patching.digests`) before and after it:

    {"chain": {"before": [7, "5c8a2f0e6b1d9374"], "after": [8, "e0b7714c93ad0f52"]}}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from deltakit.adapters.refusal import MERGE, refuse_adapters
from deltakit.delta import BaseIdentity, SparseDelta, TensorDelta
from deltakit.errors import BaseMismatchError, DeltaError
from deltakit.identity import fingerprint

_DIGEST = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Position:
    """A state in a chain: its step, and the digest of all its weights, 16 hexadecimal digits."""

    step: int
    digest: str

    def __str__(self) -> str:
        return f"step {self.step} (digest {self.digest})"


@dataclass(frozen=True, slots=True)
class Link:
    """The states that a patch leads from and to."""

    before: Position
    after: Position

    def as_json(self) -> dict[str, list[int | str]]:
        """What provenance holds under "chain"."""
        return {
            "before": [self.before.step, self.before.digest],
            "after": [self.after.step, self.after.digest],
        }


def link_of(delta: SparseDelta) -> Link | None:
    """The link that a delta records, None for one that is no patch.

    Raises DeltaError for a record that is malformed.
    """
    found = delta.provenance.get("chain")
    if found is None:
        return None
    try:
        before, after = (_position(found[side]) for side in ("before", "after"))
    except (TypeError, ValueError, KeyError):
        raise DeltaError(
            f"the delta's provenance says chain {found!r}; expected before and after, each a step "
            "from 0 and a digest of 16 hexadecimal digits"
        ) from None
    return Link(before, after)


def compose(patches: Iterable[SparseDelta]) -> SparseDelta:
    """One patch n -> m that does what consecutive patches n -> n+1, ..., m-1 -> m do, bit for bit.

    Where several write an entry the last one's bits stay. Where all carry base values, the first
    one's stay too, and entries that end with the bits they began with are dropped. The result
    carries the base identity of the first state as far as the patches tell it.
    Raises BaseMismatchError for patches that do not follow each other, and DeltaError for deltas
    that are no patches or hold anything but `set` tensors.
    """
    several = list(patches)
    links = [_checked_link(patch) for patch in several]
    if not links:
        raise DeltaError("no patch to compose")
    if len(several) == 1:
        return several[0]
    for earlier, later in pairwise(links):
        if earlier.after != later.before:
            raise BaseMismatchError(
                f"a patch leads to {earlier.after}, the next one starts from {later.before}; give "
                "consecutive patches in order"
            )
    parts: dict[str, list[TensorDelta]] = {}
    for patch in several:
        for name, tensor in patch.tensors.items():
            parts.setdefault(name, []).append(tensor)
    tensors = {name: _composed(found) for name, found in parts.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.nnz}
    link = Link(links[0].before, links[-1].after)
    return SparseDelta(
        tensors=tensors,
        base=_base(several, tensors),
        provenance={
            "operation": "compose",
            "mode": "set",
            "patches": len(several),
            "chain": link.as_json(),
        },
    )


def _position(cells: Any) -> Position:
    step, digest = cells
    if type(step) is not int or step < 0 or not _DIGEST.fullmatch(digest):
        raise ValueError
    return Position(step, digest)


def _checked_link(delta: SparseDelta) -> Link:
    refuse_adapters([delta.adapter], "a patch of weights", MERGE)
    link = link_of(delta)
    if link is None:
        raise DeltaError("a delta that records no chain is no patch and cannot be composed")
    if delta.extras or delta.config:
        raise DeltaError(f"the patch from {link.before} holds extras; patches hold entries alone")
    for tensor in delta.tensors.values():
        if tensor.mode != "set":
            raise DeltaError(
                f"tensor {tensor.name!r} of the patch from {link.before} is in add mode; patches "
                "are in set mode"
            )
    return link


def _composed(parts: Sequence[TensorDelta]) -> TensorDelta:
    """The entries of one tensor in consecutive patches: the last values, the first base values."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for other in parts[1:]:
        if (other.shape, other.dtype) != (first.shape, first.dtype):
            raise DeltaError(
                f"tensor {first.name!r} is {first.dtype} {list(first.shape)} in one patch and "
                f"{other.dtype} {list(other.shape)} in another"
            )
    indices = np.concatenate([part.indices for part in parts])
    order = np.argsort(indices, kind="stable")  # equal indices stay in the order of the patches
    indices = indices[order]
    begins = np.flatnonzero(np.diff(indices, prepend=-1))
    ends = np.append(begins[1:], len(indices)) - 1
    values = np.concatenate([part.values for part in parts])[order[ends]]
    made = replace(
        first, indices=indices[begins], values=values, base_values=None, order=None, seed=None
    )
    known = [part.base_values for part in parts if part.base_values is not None]
    if len(known) < len(parts):
        return made
    base = np.concatenate(known)[order[begins]]
    return replace(made, base_values=base).take(values != base)


def _base(patches: Sequence[SparseDelta], tensors: dict[str, TensorDelta]) -> BaseIdentity | None:
    """The identity of the first state.

    A tensor is as it was until the first patch that touches it, whose sample is thus that of the
    first state. The digest at the indices is taken anew where several patches touch a tensor, from
    their base values if those are known.
    """
    bases = [patch.base for patch in patches if patch.base is not None]
    if len(bases) < len(patches):
        return None
    known = {n: found for base in reversed(bases) for n, found in base.tensors.items()}
    prints = {}
    for name, tensor in tensors.items():
        if name not in known:
            continue
        prints[name] = known[name]
        if sum(name in patch.tensors for patch in patches) > 1:
            values = tensor.base_values
            support = None if values is None else fingerprint(values, values).support
            prints[name] = replace(known[name], support=support)
    return replace(bases[0], tensors=prints)
