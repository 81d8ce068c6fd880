"""Checking a delta file: every byte against its digest, and its base where that is at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltakit.adapters.fold_delta import computed_from
from deltakit.adapters.initial import all_initial_values
from deltakit.delta import SparseDelta
from deltakit.errors import DeltakitError, HubError, MissingFileError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta import SdeltaFile, load
from deltakit.hub.locate import label_of, local_delta
from deltakit.identity import NO_BASE, check_base
from deltakit.item_checks import Check, check_items
from deltakit.merging.hub_base import HubBase
from deltakit.merging.recorded_base import recorded_base as recorded
from deltakit.shares import Shard
from deltakit.streaming import all_at_hand, streamed

_COMMAND = "deltakit verify DELTA --base {base}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The outcome of `verify`.

    ok: whether nothing is wrong. tensors, extras, entries: how many were read and found sound.
    base: the checkpoint that it was compared with, or None. problems: one line for each thing that
    is wrong. notes: what could not be checked.
    shard: which share of the tensors was read, as "3/8"; None for all.
    """

    ok: bool
    tensors: int
    extras: int
    entries: int
    base: str | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    shard: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def verify(
    delta_path: str | Path,
    base: str | Path | Checkpoint | None = None,
    *,
    recorded_base: bool = False,
    workers: int | None = None,
    shard: Shard | str | tuple[int, int] | None = None,
    keep_base: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Read all of a .sdelta file and check it, against its base too if that is given.

    Every stream is read and compared with its sha256, and every tensor is held against the rules of
    the data model; one tensor is in memory at a time, or one for each of `workers` threads. With a
    base, names, shapes, dtypes and the digests of base values are compared; recorded_base takes the
    repository and commit that the delta records (see `deltakit.merging.recorded_base`). A base on the
    Hub comes one weight file at a time, and only those that the delta touches; keep_base: whether what is
    downloaded for this stays in the cache. An adapter's initial values are made anew, all of them at a
    time, and held against its check value; DoRA needs the base for that. shard: (i, n) or "i/n" checks
    share i of n of the tensors, counted from 1: whole weight files of the base where these are at
    least n; all is sound when all n are. An adapter's values are the first's to check. What is wrong
    is reported, tensor by tensor, not raised; only a delta file or a base that cannot be opened raises MissingFileError, a base that is no
    checkpoint FormatError, and one that holds a part of a merge in place JournalError; one on the Hub
    that cannot be had raises HubError or ConfigError. progress: called with (entries done, entries
    in all).
    """
    job = Shard(1, 1) if shard is None else Shard.parse(shard)
    of = None if shard is None else str(job)
    checkpoint = None if base is None else streamed(base, keep=keep_base)
    path = local_delta(delta_path)
    try:
        opened = SdeltaFile(path)
    except MissingFileError:
        raise
    except DeltakitError as error:
        return _report([], None, [str(error)], [], of)
    notes: list[str] = []
    problems: list[str] = []
    with opened as file:
        if recorded_base:
            found = recorded([(label_of(delta_path), file.base)], _COMMAND)
            checkpoint = HubBase(found.listing, keep=keep_base)
            notes += found.notes
        checks = check_items(file, checkpoint, job, workers, progress)
        for check in checks:
            notes += check.notes
            problems += check.problems
        if file.adapter is not None and not problems and job.number == 1:
            problems, more = _adapter(load(path), checkpoint)
            notes += more
        if file.base is None:
            notes.append(NO_BASE)
        elif checkpoint is None:
            notes.append("no base given, so only the file itself was checked")
    return _report(checks, checkpoint, problems, notes, of)


def _adapter(delta: SparseDelta, checkpoint: Checkpoint | None) -> tuple[list[str], list[str]]:
    """What is wrong with an adapter and its base, and what could not be checked."""
    assert delta.adapter is not None
    notes = []
    whole = nullcontext() if checkpoint is None else all_at_hand(checkpoint.tensors, checkpoint)
    try:
        with whole:
            if checkpoint is not None:
                notes = [note for note in check_base(delta, checkpoint) if note != NO_BASE]
            computed = computed_from(delta, checkpoint)
            if computed is None and any("computed" in r for r in delta.adapter.initial.values()):
                return [], [
                    "the adapter's check value is not proven: its initial values need the base"
                ]
            all_initial_values(delta, computed)
    except HubError:
        raise
    except DeltakitError as error:
        return [str(error)], notes
    return [], notes


def _report(
    checks: Sequence[Check],
    base: Checkpoint | None,
    problems: Sequence[str],
    notes: Sequence[str],
    shard: str | None,
) -> VerifyReport:
    sound = [check for check in checks if not check.problems]
    return VerifyReport(
        ok=not problems,
        tensors=sum(not check.is_extra for check in sound),
        extras=sum(check.is_extra for check in sound),
        entries=sum(check.entries for check in sound),
        base=None if base is None else str(base),
        problems=tuple(problems),
        notes=tuple(notes),
        shard=shard,
    )
