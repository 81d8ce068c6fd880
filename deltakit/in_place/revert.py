"""Taking merges in place back: the model's files get the very bytes that they had."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltakit.errors import JournalError, MissingFileError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.in_place.journal import Journal
from deltakit.in_place.journal_record import Record, check_bits
from deltakit.in_place.recovery import Progress, settle, write_back
from deltakit.in_place.weights import OpenWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class RevertReport:
    """What a revert did.

    model: the path of the checkpoint. deltas: those that were taken back. tensors, entries: that
    have their original bits again; none where interrupted work was all there was to take back.
    files: weight files that hold them. notes: what the user should know.
    """

    model: str
    deltas: tuple[str, ...]
    tensors: int
    entries: int
    files: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def revert(
    model: str | Path,
    *,
    undo: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> RevertReport:
    """Take all merges in place back and remove the journal.

    model: as given to `merge_in_place`. undo: the `undo.sdelta` of a journal that stands elsewhere
    (it is kept); by default the one of the journal beside the model. force: restore the original
    bits also where something else has changed the entries since, and through links. progress:
    called with (entries done, entries in all).

    Killed at any instant, the next merge or revert finishes it. Raises MissingFileError where there
    is nothing to take back, JournalError for entries that are not as the merge left them (unless
    `force`), OutputError where the files cannot be written.
    """
    with OpenWeights(model) as opened:
        checkpoint = opened.checkpoint
        journal = Journal(checkpoint)
        journal.refuse_others()
        notes = settle(opened, journal, force=force)
        record = _record(journal, undo) if undo is not None else journal.merged()
        if record is None and not notes:
            raise MissingFileError(
                f"{checkpoint.path} has no merge in place to be taken back ({journal.undo} does not "
                "exist)"
            )
        if record is None:
            return RevertReport(
                model=str(checkpoint.path),
                deltas=(),
                tensors=0,
                entries=0,
                files=(),
                notes=tuple(notes),
            )
        record.check_coordinates(checkpoint)
        if not (force or record.through_links):
            opened.refuse_links()
        if _is_original(checkpoint, record):
            notes.append("the weights have their original bits already; the journal is removed")
        elif not force:
            check_bits(checkpoint, record)
        opened.refuse_changes()
        journal.begin_revert(record)
        write_back(opened, journal, record, progress)
    return RevertReport(
        model=str(checkpoint.path),
        deltas=tuple(each.label for each in record.merged),
        tensors=len(record.tensors),
        entries=record.entries,
        files=tuple(dict.fromkeys(checkpoint.info(name).file.name for name in record.tensors)),
        notes=tuple(notes),
    )


def _record(journal: Journal, undo: str | Path) -> Record:
    record = Record.load(Path(undo))
    if journal.undo.exists() and journal.undo.read_bytes() != Path(undo).read_bytes():
        raise JournalError(
            f"{undo} is not what {journal.undo} tells of {journal.model}; revert without --undo"
        )
    return record


def _is_original(checkpoint: Checkpoint, record: Record) -> bool:
    """Whether every entry has its original bits, as after a fresh download."""
    return all(
        bool((checkpoint.gather(name, tensor.indices) == tensor.values).all())
        for name, tensor in record.tensors.items()
    )
