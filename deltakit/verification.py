"""Checking a delta file: every byte against its digest, and its base where that is at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltakit.adapters.fold_delta import computed_from
from deltakit.adapters.initial import all_initial_values
from deltakit.delta import SparseDelta, TensorDelta
from deltakit.errors import DeltakitError, MissingFileError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta import SdeltaFile, load
from deltakit.hub.locate import label_of, local_delta
from deltakit.identity import NO_BASE, check_base
from deltakit.merging.hub_base import whole_recorded_base

_COMMAND = "deltakit verify DELTA --base {base}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The outcome of `verify`.

    ok: whether nothing is wrong. tensors, extras, entries: how many were read and found sound.
    base: the checkpoint that it was compared with, or None. problems: one line for each thing that
    is wrong. notes: what could not be checked.
    """

    ok: bool
    tensors: int
    extras: int
    entries: int
    base: str | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def verify(
    delta_path: str | Path,
    base: str | Path | Checkpoint | None = None,
    *,
    recorded_base: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Read all of a .sdelta file and check it, against its base too if that is given.

    Every stream is read and compared with its sha256, and every tensor is held against the rules of
    the data model; one tensor is in memory at a time. With a base, names, shapes, dtypes and the
    digests of base values are compared; recorded_base takes the repository and commit that the delta
    records, from the cache or downloaded (see `deltakit.merging.recorded_base`). An adapter's initial values are made anew, all of them at a
    time, and held against its check value; DoRA needs the base for that. What is wrong is reported,
    tensor by tensor, not raised; only a delta file or a base that cannot be opened raises MissingFileError, a base that is no
    checkpoint FormatError, and one that holds a part of a merge in place JournalError; a recorded one
    that cannot be had raises HubError or ConfigError. progress: called with (entries done, entries
    in all).
    """
    checkpoint = Checkpoint(base) if isinstance(base, (str, Path)) else base
    problems: list[str] = []
    notes = [] if checkpoint is None else list(checkpoint.notes)
    tensors = extras = entries = 0
    path = local_delta(delta_path)
    try:
        opened = SdeltaFile(path)
    except MissingFileError:
        raise
    except DeltakitError as error:
        return _report(0, 0, 0, None, [str(error)], [])
    with opened as file:
        if recorded_base:
            checkpoint, found = whole_recorded_base(label_of(delta_path), file.base, _COMMAND)
            notes += found
        seen = 0
        for name, record in file.tensors.items():
            seen += record.nnz
            if progress is not None:
                progress(seen, file.header.nnz)
            try:
                tensor = file.tensor(name)
                notes += _against_base(file, tensor, checkpoint)
            except DeltakitError as error:
                problems.append(str(error))
                continue
            tensors, entries = tensors + 1, entries + tensor.nnz
        for name in file.extras:
            try:
                array = file.extra(name)
                if checkpoint is not None:
                    check_base(SparseDelta(tensors={}, extras={name: array}), checkpoint)
            except DeltakitError as error:
                problems.append(str(error))
                continue
            extras += 1
        if file.adapter is not None and not problems:
            problems, more = _adapter(load(path), checkpoint)
            notes += more
        if file.base is None:
            notes.append(NO_BASE)
        elif checkpoint is None:
            notes.append("no base given, so only the file itself was checked")
    return _report(tensors, extras, entries, checkpoint, problems, notes)


def _against_base(
    file: SdeltaFile, tensor: TensorDelta, checkpoint: Checkpoint | None
) -> list[str]:
    if checkpoint is None or file.adapter is not None:
        return []
    alone = SparseDelta(tensors={tensor.name: tensor}, base=file.base)
    return [note for note in check_base(alone, checkpoint) if note != NO_BASE]


def _adapter(delta: SparseDelta, checkpoint: Checkpoint | None) -> tuple[list[str], list[str]]:
    """What is wrong with an adapter and its base, and what could not be checked."""
    assert delta.adapter is not None
    notes = []
    try:
        if checkpoint is not None:
            notes = [note for note in check_base(delta, checkpoint) if note != NO_BASE]
        computed = computed_from(delta, checkpoint)
        if computed is None and any("computed" in r for r in delta.adapter.initial.values()):
            return [], ["the adapter's check value is not proven: its initial values need the base"]
        all_initial_values(delta, computed)
    except DeltakitError as error:
        return [str(error)], notes
    return [], notes


def _report(
    tensors: int,
    extras: int,
    entries: int,
    base: Checkpoint | None,
    problems: Sequence[str],
    notes: Sequence[str],
) -> VerifyReport:
    return VerifyReport(
        ok=not problems,
        tensors=tensors,
        extras=extras,
        entries=entries,
        base=None if base is None else str(base),
        problems=tuple(problems),
        notes=tuple(notes),
    )
