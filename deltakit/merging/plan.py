"""What a merge will do, settled and checked before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltakit.diffing.grown_rows import appended_to
from deltakit.dtypes import DTYPES, Array, DType, dtype_of
from deltakit.errors import ConfigError, DeltaError, nearest
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.mapped_file import GATHER_MAPPED
from deltakit.formats.safetensors_file import TensorInfo
from deltakit.identity import NO_BASE
from deltakit.merging.arithmetic import Contribution, union_between
from deltakit.merging.base_values import checked
from deltakit.merging.folding import Term, fold, folding_memory
from deltakit.merging.inputs import Input, chosen_head, common_config, common_extras, contributions
from deltakit.merging.quantized import Quantized, plain_part, quantized_in, refuse_conversion

if TYPE_CHECKING:
    from deltakit.merging.requantize import Requantizer

WINDOW = 2**18  # elements that are read, changed and written at a time


@dataclass(frozen=True, slots=True)
class Plan:
    """A merge, ready to be written.

    touched: tensor name -> the contributions to it. folded: the same with those of adapters, for
    the tensors at which adapters stand. extras: name -> whole tensors to be written.
    config: keys to be changed in config.json. dtype: as asked for: None, "trained" or a name.
    untouched: for "trained", the dtype that tensors without entries take (None: their own).
    requantizer: makes the tensors that are quantised again, or None. deferred: whose base values are
    compared when the weight files come (see `deltakit.merging.base_values`); `allow_base_mismatch`
    lets other values through then.
    """

    base: Checkpoint
    inputs: Sequence[Input]
    touched: Mapping[str, Sequence[Contribution]]
    extras: Mapping[str, Array]
    config: Mapping[str, Any]
    dtype: str | None = None
    untouched: str | None = None
    notes: list[str] = field(default_factory=list)
    requantizer: Requantizer | None = None
    deferred: Sequence[Input] = ()
    allow_base_mismatch: bool = False
    folded: Mapping[str, Sequence[Term]] = field(default_factory=dict)

    @property
    def entries(self) -> int:
        """Entries that change: the union of the supports, over all tensors, and the entries of
        adapters, as they stand in these."""
        plain = sum(_union_size(parts) for parts in self.touched.values())
        return plain + sum(e.delta.nnz for e in self.inputs if e.delta.adapter is not None)

    def terms(self, name: str) -> Sequence[Term]:
        """All that is merged into a tensor of the base, in order."""
        return self.folded.get(name) or self.touched.get(name, ())

    @property
    def appended(self) -> dict[str, Array]:
        """Tensor of the base -> the rows to be appended to it (see `deltakit.diffing.grown_rows`)."""
        grown = {name: appended_to(name) for name in self.extras}
        return {to[0]: self.extras[name] for name, to in grown.items() if to is not None}

    def merge_kind(self, info: TensorInfo) -> DType:
        """The dtype in which a tensor of the base is merged."""
        if self.dtype != "trained" or not info.kind.is_floating:
            return info.kind
        if info.name in self.touched:
            return DTYPES[self.touched[info.name][0].delta.trained_dtype]
        return DTYPES[self.untouched or info.dtype]

    def output_kind(self, kind: DType) -> DType:
        """The dtype in which a tensor merged (or brought along) in `kind` is written."""
        if self.dtype in (None, "trained") or not kind.is_floating:
            return kind
        return DTYPES[str(self.dtype)]

    @property
    def peak_memory(self) -> int:
        """Upper estimate, in bytes, of what the merge keeps in memory at once: the deltas, the
        extras, the working arrays of one window, the descriptions of all tensors, and the pages of
        the base that are mapped at once."""
        held = sum(_held(each) for each in self.inputs)
        converted = max((a.size * 8 for a in self.extras.values()), default=0) if self.dtype else 0
        densest = max((_densest_window(parts) for parts in self.touched.values()), default=0)
        largest = max((info.numel for info in self.base.tensors.values()), default=0)
        window = 24 * min(WINDOW, largest) + densest * (64 + 32 * len(self.inputs))
        descriptions = 2**20 + 4096 * len(self.base.tensors)
        again = 0 if self.requantizer is None else self.requantizer.peak_memory
        folding = folding_memory(self.folded, min(WINDOW, largest), len(self.base.shards))
        return held + converted + window + descriptions + GATHER_MAPPED + again + folding


def plan_merge(
    base: Checkpoint,
    inputs: Sequence[Input],
    *,
    dtype: str | None = None,
    allow_base_mismatch: bool = False,
    head: int | str | Path | None = None,
    settled: int = 0,
    requantize: bool = False,
    defer: bool = False,
) -> Plan:
    """Check every delta against the base and against each other; see `deltakit.merge`.

    The base of the first `settled` inputs has been checked by an earlier merge. defer: leave base
    values, which are not on this machine yet, to `deltakit.merging.base_values.check_arrived`.
    """
    _check_dtype(dtype)
    quantized = quantized_in(inputs, base, requantize=requantize)
    refuse_conversion(base, dtype)
    notes = list(base.notes)
    deferred: list[Input] = []
    for each in inputs[settled:]:
        plain = plain_part(each.delta, quantized)
        if defer and plain.base is not None and plain.adapter is None:
            deferred.append(each)
            found = checked(each, replace(plain, base=None), base, allow_base_mismatch)
            notes += [note for note in found if not note.endswith(NO_BASE)]
        else:
            notes += checked(each, plain, base, allow_base_mismatch)
    chosen = chosen_head(inputs, head)
    touched = contributions(inputs)
    extras = common_extras(inputs, chosen)
    config = common_config(inputs, chosen)
    if extras and any(each.weight != 1 for each in inputs):
        notes.append("weights do not apply to extras, which are written whole")
    untouched = None
    if dtype == "trained":
        untouched, more = _trained(touched)
        notes += more
    elif dtype is None:
        notes += _not_as_trained(base, {n: t for n, t in touched.items() if n not in quantized})
    again = _requantizer(base, quantized, touched, notes) if quantized else None
    plan = Plan(
        base,
        inputs,
        touched,
        extras,
        config,
        dtype,
        untouched,
        notes,
        again,
        deferred,
        allow_base_mismatch,
    )
    both = [name for name in plan.appended if name in extras]
    if both:
        raise DeltaError(
            f"{both[0]!r} is a whole extra in one delta and gets rows appended by another; the two "
            "cannot be merged"
        )
    for name in touched:  # refuses dtypes that cannot be read before anything is written
        plan.merge_kind(base.tensors[name])
    return _with_adapters(plan)


def _with_adapters(plan: Plan) -> Plan:
    """The plan with what adapters change, which may depend on how the base's tensors are merged."""
    if all(each.delta.adapter is None for each in plan.inputs):
        return plan
    if plan.requantizer is not None:
        raise ConfigError(
            "adapters are folded into full-precision weights; merge them into the full-precision "
            "base, or without them with --requantize"
        )
    folded = fold(plan.inputs, plan.base, plan.merge_kind)
    whole = [name for name in folded if name in plan.extras]
    if whole:
        raise DeltaError(
            f"{whole[0]!r} is a whole extra in one delta and an adapter stands at it; the two cannot "
            "be merged"
        )
    return replace(plan, folded=folded)


def _requantizer(
    base: Checkpoint,
    quantized: Mapping[str, Quantized],
    touched: Mapping[str, Sequence[Contribution]],
    notes: list[str],
) -> Requantizer:
    try:
        from deltakit.merging.requantize import Requantizer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--requantize (requantize=True) needs {error.name}, which is not installed; "
            "pip install 'deltakit-sparse[train,8bit]'"
        ) from None
    notes.append(
        f"the base holds {len(quantized)} of the deltas' tensors quantised (such as "
        f"{next(iter(quantized))!r}), so their values do not show whether it is the right one"
    )
    return Requantizer(base, quantized, touched)


def _check_dtype(name: str | None) -> None:
    known = [kind.name for kind in DTYPES.values() if kind.is_floating]
    if name is not None and name != "trained" and name not in known:
        raise ConfigError(
            f"dtype {name!r} is not one of: trained, {', '.join(known)}{nearest(name, ['trained', *known])}"
        )


def _trained(touched: Mapping[str, Sequence[Contribution]]) -> tuple[str | None, list[str]]:
    """The dtype that all touched tensors were trained in, or None and a note."""
    found: dict[str, str] = {}
    for name, parts in touched.items():
        dtypes = {part.delta.trained_dtype: None for part in parts}
        if len(dtypes) > 1:
            raise ConfigError(
                f"tensor {name!r} was trained in {' and in '.join(dtypes)} by different deltas, so "
                "'trained' is not clear; give a dtype"
            )
        if parts[0].delta.kind.is_floating:
            found.setdefault(next(iter(dtypes)), name)
    if len(found) <= 1:
        return next(iter(found), None), []
    listed = ", ".join(f"{dtype} (such as {name!r})" for dtype, name in found.items())
    return None, [f"tensors were trained in several dtypes, {listed}; the others keep their own"]


def _not_as_trained(base: Checkpoint, touched: Mapping[str, Sequence[Contribution]]) -> list[str]:
    differ = [
        (name, part.delta.trained_dtype)
        for name, parts in touched.items()
        for part in parts
        if part.delta.trained_dtype != base.tensors[name].dtype
    ]
    if not differ:
        return []
    name, trained = differ[0]
    note = (
        f"{name!r} was trained in {trained} and is merged in {base.tensors[name].dtype}, so the "
        "trained bits may not be reproduced; dtype='trained' (--dtype trained) does that"
    )
    return [note]


def _union_size(parts: Sequence[Contribution]) -> int:
    if len(parts) == 1:
        return parts[0].delta.nnz
    starts = range(0, parts[0].delta.numel, WINDOW)
    return sum(len(union_between(parts, start, start + WINDOW)) for start in starts)


def _densest_window(parts: Sequence[Contribution]) -> int:
    counts = sum(int(np.bincount(part.delta.indices // WINDOW).max(initial=0)) for part in parts)
    return min(WINDOW, counts)


def _held(given: Input) -> int:
    size = sum(array.nbytes for array in given.delta.extras.values())
    for tensor in given.delta.tensors.values():
        arrays = (tensor.indices, tensor.values, tensor.order, tensor.base_values)
        size += sum(array.nbytes for array in arrays if array is not None)
    return size


def extra_kind(plan: Plan, array: Array) -> DType:
    """The dtype in which an extra is written."""
    return plan.output_kind(dtype_of(array))
