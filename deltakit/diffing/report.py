"""What a diff wrote to a file, and what the user should know about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltakit.delta import Mode, in_tensor_order
from deltakit.diffing.checkpoint_entries import Sides
from deltakit.formats.sdelta import SdeltaFile
from deltakit.formats.sdelta_stream import SdeltaStream
from deltakit.shares import ShareReport


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffReport:
    """What `diff` wrote to a file.

    output: its path. bytes: its size. entries: what it holds; differing: elements that differ, more
    than that where a budget was given. tensors: how many have entries. extras: names of whole
    tensors and of new rows. stayed_set: tensors in set mode although add was asked for. codings:
    index coding -> tensors written in it. notes: what the user should know.
    share: what a job of a job array did (None without `shard`).
    """

    output: str
    bytes: int
    entries: int
    differing: int
    tensors: int
    extras: tuple[str, ...]
    stayed_set: tuple[str, ...]
    codings: Mapping[str, int]
    notes: tuple[str, ...]
    share: ShareReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def report_of(
    out: Path,
    stream: SdeltaStream | SdeltaFile,
    sides: Sides,
    differing: int,
    mode: Mode,
    share: ShareReport | None = None,
) -> DiffReport:
    """The report on a file that has been written from `sides`, in which `differing` elements
    differ."""
    records = stream.tensors.values()
    codings: dict[str, int] = {}
    for record in records:
        codings[record.coding] = codings.get(record.coding, 0) + 1
    stayed = tuple(record.name for record in records if record.mode != mode)
    whole = [record.name for record in records if record.coding in ("dense", "bitmap")]
    entries = sum(record.nnz for record in records)
    notes = [*sides.base.notes, *sides.tuned.notes]
    if entries < differing:
        notes.append(
            f"lossy: the {entries:,} largest of {differing:,} changes are kept, so merging does not "
            "give the tuned tensors back"
        )
    if stayed:
        notes.append(
            f"base + difference does not give the bits back in {_some(stayed)}, which stay in set "
            "mode"
        )
    if whole:
        notes.append(
            f"positions in {_some(whole)} are coded densely (in nothing or one bit per element), "
            "which is smaller than coordinates"
        )
    if sides.tied:
        notes.append(
            f"{_some(sides.tied)} of the tuned side is another tensor of it once more (tied), so it "
            "is left out"
        )
    if sides.lacking:
        notes.append(f"the tuned side lacks {_some(sides.lacking)}, which stay as in the base")
    if sides.grown:
        notes.append(
            f"new rows of {_some(sides.grown)} are kept whole; a delta holds no tokenizer, so take "
            f"its files from {sides.tuned.path}"
        )
    kept = sides.config_kept() if stream.extras else []
    if kept:
        notes.append(
            f"config.json of the tuned side lacks {', '.join(kept)}; a delta cannot remove keys, so "
            "merging keeps them as in the base"
        )
    return DiffReport(
        output=str(out),
        bytes=out.stat().st_size,
        entries=entries,
        differing=differing,
        tensors=len(records),
        extras=tuple(in_tensor_order(stream.extras)),
        stayed_set=stayed,
        codings=codings,
        notes=tuple(notes),
        share=share,
    )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    if len(listed) <= 3:
        return ", ".join(listed)
    return f"{len(listed)} tensors ({', '.join(listed[:3])}, ...)"
