"""The weight files of a merge: which tensors each holds, and the bytes of every one of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from deltakit.diffing.grown_rows import appended_to
from deltakit.dtypes import DTYPES, Array, DType, dtype_of
from deltakit.formats import rewrite
from deltakit.formats.checkpoint import Shard
from deltakit.formats.rewrite import Part, Piece
from deltakit.formats.safetensors_file import TensorInfo
from deltakit.merging.arithmetic import cast
from deltakit.merging.folding import Term, merging
from deltakit.merging.plan import WINDOW, Plan, extra_kind


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A weight file to be written: its name, its header, and its tensors in order."""

    name: str
    header: bytes
    parts: Sequence[Part]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(part.nbytes for part in self.parts)


@dataclass(slots=True)
class Overflows:
    """Counts entries that became infinite or NaN by the merge, by tensor name."""

    counts: dict[str, int] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """One line for each tensor."""
        return [
            f"tensor {name!r}: {count} entries that were finite are infinite or NaN after the merge"
            for name, count in self.counts.items()
            if count
        ]


def weight_files(plan: Plan, overflows: Overflows, one_file: str | None = None) -> list[WeightFile]:
    """The weight files of the merged checkpoint: one for each of the base's, or a single one
    called `one_file` with all tensors.

    Extras that the base lacks join the last file. A file whose tensors keep names, dtypes and
    shapes keeps its header byte for byte.
    """
    shards = list(plan.base.shards.values())
    own = [name for name in sorted(plan.extras, key=str.encode) if appended_to(name) is None]
    new = [name for name in own if name not in plan.base.tensors]
    if one_file is not None and len(shards) > 1:
        parts = [
            _part(plan, shard, info, overflows)
            for shard in shards
            for info in shard.tensors.values()
            if _listed(plan, info)
        ]
        parts = rewrite.arranged(parts + [_extra(plan, name) for name in new])
        metadata = shards[0].header.metadata
        return [WeightFile(one_file, rewrite.header(parts, metadata), parts)]
    last = shards[-1]
    return [
        _shard_file(plan, shard, new if shard is last else [], one_file, overflows)
        for shard in shards
    ]


def _shard_file(
    plan: Plan, shard: Shard, new: list[str], name: str | None, overflows: Overflows
) -> WeightFile:
    infos = [info for info in shard.tensors.values() if info.name not in new]
    parts = [_part(plan, shard, info, overflows) for info in infos]
    kept = [(part.code, part.shape) for part in parts]
    if not new and kept == [(e.dtype, e.shape) for e in shard.header.entries.values()]:
        return WeightFile(name or shard.path.name, shard.head(), parts)
    parts = rewrite.arranged(parts + [_extra(plan, extra) for extra in new])
    return WeightFile(name or shard.path.name, rewrite.header(parts, shard.header.metadata), parts)


def _listed(plan: Plan, info: TensorInfo) -> bool:
    return plan.base.tensors.get(info.name) == info


def _part(plan: Plan, shard: Shard, info: TensorInfo, overflows: Overflows) -> Part:
    """The merged form of a tensor of the base."""
    if info.name in plan.extras and _listed(plan, info):
        return _extra(plan, info.name)
    if info.dtype not in DTYPES or not _listed(plan, info):
        code = DTYPES[info.dtype].code if info.dtype in DTYPES else info.dtype
        return Part(info.name, code, info.shape, info.nbytes, partial(shard.pieces, info.name))
    if plan.requantizer is not None and info.name in plan.requantizer.parts:
        made = plan.requantizer.parts[info.name]
        return Part(info.name, info.kind.code, info.shape, info.nbytes, made)
    kind = plan.merge_kind(info)
    out = plan.output_kind(kind)
    size = info.numel * out.itemsize
    pieces: Callable[[], Iterable[Piece]] = partial(shard.pieces, info.name)
    terms = plan.terms(info.name)
    if terms or not info.kind is kind is out:
        pieces = partial(_changed, shard, info, terms, kind, out, overflows)
    part = Part(info.name, out.code, info.shape, size, pieces)
    rows = plan.appended.get(info.name)
    return part if rows is None else _longer(part, rows, kind, out)


def _longer(part: Part, rows: Array, kind: DType, out: DType) -> Part:
    """The tensor with rows behind its own, converted as those are."""

    def pieces() -> Iterator[Piece]:
        yield from part.pieces()
        words = np.ascontiguousarray(rows).reshape(-1).view(dtype_of(rows).words)
        yield cast(cast(words, dtype_of(rows), kind), kind, out).view(np.uint8).data

    shape = (part.shape[0] + len(rows), *part.shape[1:])
    return Part(part.name, part.code, shape, part.nbytes + rows.size * out.itemsize, pieces)


def _extra(plan: Plan, name: str) -> Part:
    array = plan.extras[name]
    kind = extra_kind(plan, array)

    def pieces() -> list[Piece]:
        with np.errstate(over="ignore", invalid="ignore"):  # too large becomes inf, as in torch
            flat = np.ascontiguousarray(array).reshape(-1).astype(kind.numpy, copy=False)
        return [flat.view(np.uint8).data]

    return Part(name, kind.code, array.shape, array.size * kind.itemsize, pieces)


def _changed(
    shard: Shard,
    info: TensorInfo,
    terms: Sequence[Term],
    kind: DType,
    out: DType,
    overflows: Overflows,
) -> Iterator[Piece]:
    """The tensor window by window: read, cast to `kind`, merged, cast to `out`."""
    buffer = np.empty(min(WINDOW, info.numel), info.kind.words)
    with shard.reader(info.name) as read:
        for start in range(0, info.numel, WINDOW):
            stop = min(start + WINDOW, info.numel)
            merge = merging(terms, start, stop, kind)
            if merge is None and info.kind is kind is out:
                yield from shard.pieces(info.name, start, stop)
                continue
            words = buffer[: stop - start]
            read(start, words)
            words = cast(words, info.kind, kind)
            if merge is not None:
                before, after = merge(words)
                count_overflows(info.name, before, after, kind, overflows)
            yield cast(words, kind, out).view(np.uint8).data


def count_overflows(
    name: str, before: Array, after: Array, kind: DType, overflows: Overflows
) -> None:
    """Count the words [n] that are finite in `before` and no longer in `after`."""
    if not kind.is_floating:
        return
    with np.errstate(invalid="ignore"):  # signalling NaNs
        broken = ~np.isfinite(after.view(kind.numpy))
        if broken.any():
            count = int(np.isfinite(before[broken].view(kind.numpy)).sum())
            overflows.counts[name] = overflows.counts.get(name, 0) + count


def index_file(plan: Plan, files: Sequence[WeightFile]) -> dict[str, bytes]:
    """Name and content of the index of the merged checkpoint; empty where the base has none.

    The base's own bytes where neither names nor sizes change.
    """
    found = plan.base.index_content()
    if found is None:
        return {}
    index, old = found
    content: dict[str, Any] = json.loads(old)
    weight_map = {
        part.name: file.name
        for file in files
        for part in file.parts
        if content["weight_map"].get(part.name) == file.name or part.name in plan.extras
    }
    size = sum(p.nbytes for f in files for p in f.parts if weight_map.get(p.name) == f.name)
    metadata = content.get("metadata")
    same_size = size == sum(info.nbytes for info in plan.base.tensors.values())
    if weight_map == content["weight_map"] and same_size:
        return {index: old}
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = size
    if isinstance(metadata, dict) and "total_parameters" in metadata:
        added = sum(a.size for n, a in plan.extras.items() if n not in plan.base.tensors)
        metadata["total_parameters"] = int(metadata["total_parameters"]) + added
    content["weight_map"] = dict(sorted(weight_map.items(), key=lambda item: item[0].encode()))
    return {index: json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"}
