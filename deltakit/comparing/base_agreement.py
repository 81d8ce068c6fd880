"""Do two deltas belong to one base? Told from what they record, without the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from deltakit.adapter import Adapter
from deltakit.delta import BaseIdentity, Fingerprint, SparseDelta, TensorDelta
from deltakit.errors import BaseMismatchError

Verdict = Literal["same", "different", "unknown"]


class Agreement(NamedTuple):
    """Whether two deltas belong to one base, and what shows it."""

    verdict: Verdict
    why: str


class Described(Protocol):
    """A SparseDelta or an open SdeltaFile: shapes and dtypes by tensor, the base, the adapter."""

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    @property
    def base(self) -> BaseIdentity | None: ...

    @property
    def adapter(self) -> Adapter | None: ...


def base_agreement(one: Described, other: Described) -> Agreement:
    """What the two record about their bases: same, different or unknown, and why.

    A shape that differs shows another base, and so does a digest of base values taken in the same
    dtype; a digest that agrees shows the same base. Without digests to compare, equal model ids
    and revisions count as the same, and anything else as unknown. Takes O(tensors).
    Of an adapter's delta the tensors count at which it stands.
    """
    common = [name for name in one.tensors if name in other.tensors]
    for name in common if one.adapter is None and other.adapter is None else ():
        shapes = [list(each.tensors[name].shape) for each in (one, other)]
        if shapes[0] != shapes[1]:
            return Agreement("different", f"tensor {name!r} has shape {shapes[0]} and {shapes[1]}")
    if one.base is None or other.base is None:
        return Agreement("unknown", "not every delta records its base")
    totals = (one.base.total_weights, other.base.total_weights)
    if None not in totals and totals[0] != totals[1]:
        return Agreement("different", f"the bases have {totals[0]:,} and {totals[1]:,} weights")
    compared = 0
    theirs = _samples(other)
    for name, (dtypes, sample) in _samples(one).items():
        if name not in theirs or not dtypes & theirs[name][0]:
            continue  # the digests are of values in different dtypes
        samples = sample, theirs[name][1]
        if samples[0] != samples[1]:
            return Agreement(
                "different",
                f"tensor {name!r} has other base values (sample digest {samples[0]} and "
                f"{samples[1]})",
            )
        compared += 1
    if compared:
        return Agreement("same", f"digests of base values agree, tensors: {compared}")
    if one.base.model_id is not None and _published(one.base) == _published(other.base):
        return Agreement("same", f"both were made for {one.base.model_id}")
    return Agreement("unknown", "no tensor is in both with a digest to compare")


def _samples(given: Described) -> dict[str, tuple[set[str], str]]:
    """Tensor of the base -> the dtypes in which its digest holds ("" for the one on disk, whatever
    that is), and the digest."""
    found = {}
    for name, seen in ({} if given.base is None else given.base.tensors).items():
        if given.adapter is None and name in given.tensors:
            tensor = given.tensors[name]
            on_disk = {""} if tensor.trained_dtype == tensor.dtype else set()
            found[name] = ({tensor.trained_dtype, *on_disk}, seen.sample)
        elif given.adapter is not None and name not in given.tensors:
            found[name] = ({""}, seen.sample)
    return found


def require_one_base(one: SparseDelta, other: SparseDelta) -> None:
    """Raise BaseMismatchError for two deltas of different bases, or that hold a tensor in another
    dtype; what is unknown passes, as in merging."""
    agreement = base_agreement(one, other)
    if agreement.verdict == "different":
        raise BaseMismatchError(
            f"the deltas belong to different bases: {agreement.why}; they cannot be combined"
        )
    for name, tensor in one.tensors.items():
        if name not in other.tensors:
            continue
        dtypes = [(t.dtype, t.trained_dtype) for t in (tensor, other.tensors[name])]
        if dtypes[0] != dtypes[1]:
            mine, theirs = (f"{disk} trained as {trained}" for disk, trained in dtypes)
            raise BaseMismatchError(
                f"tensor {name!r} is {mine} in one delta and {theirs} in the other; they cannot "
                "be combined"
            )


def base_of(made: Mapping[str, TensorDelta], *given: SparseDelta) -> BaseIdentity | None:
    """The identity of the base of tensors `made` from the deltas `given`.

    Digests of supports stay only where a tensor has the very support of one of the given deltas.
    The model id and revision stay where the deltas that record a base agree on them.
    Of an adapter's delta also the digests of tensors that are not its own stay.
    """
    known = [delta for delta in given if delta.base is not None]
    bases = [delta.base for delta in known if delta.base is not None]
    if not bases:
        return None
    prints: dict[str, Fingerprint] = {}
    for name, tensor in made.items():
        for delta, base in zip(known, bases, strict=True):
            if name in base.tensors and name in delta.tensors:
                same = np.array_equal(delta.tensors[name].indices, tensor.indices)
                seen = base.tensors[name]
                prints[name] = seen if same else replace(seen, support=None)
                if same:
                    break
    for delta, base in zip(known, bases, strict=True):
        if delta.adapter is not None:
            prints |= {n: seen for n, seen in base.tensors.items() if n not in delta.tensors}
    agreed = len({_published(base) for base in bases}) == 1
    return BaseIdentity(
        model_id=bases[0].model_id if agreed else None,
        revision=bases[0].revision if agreed else None,
        total_weights=next((b.total_weights for b in bases if b.total_weights is not None), None),
        tensors=prints,
    )


def _published(base: BaseIdentity) -> tuple[str | None, str | None]:
    return base.model_id, base.revision
