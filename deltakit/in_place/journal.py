"""The journal of in-place merges: enough to take them back, whenever a process ends.

It is a folder beside the weights, called after the weight file (the index, where there is one):

    model.safetensors.undo/
        undo.sdelta       what was changed: original and merged bits (see `journal_record`)
        next.sdelta       the same of a merge that is being written
        reverting.sdelta  undo.sdelta while the original bits are being written back
        DIGEST.sdelta     the deltas merged so far

Every file appears whole or not at all, and is on the disk before the weights change. So the names
that are there tell the state, and what brings a model back to rest:

    undo      next  reverting   the weights
    -         -     -           are the base's
    yes       -     -           hold the merge
    -         yes   -           part of the first merge: it is rolled back
    yes       yes   -           part of a further merge: it is rolled back to the one before
    -         -     yes         part of a revert: it is finished
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from deltakit.dtypes import Array
from deltakit.errors import JournalError, MissingFileError
from deltakit.formats import sdelta
from deltakit.formats.atomic import describing, sync, write_bytes
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.undo_folder import NEXT, REVERTING, SUFFIX, UNDO
from deltakit.in_place.journal_record import Merged, Record, described
from deltakit.merging.inputs import Input
from deltakit.merging.plan import Plan

_OURS = re.compile(r"[0-9a-f]{32}\.sdelta|\..+\.tmp")  # what may be pruned


class Journal:
    """The journal of a checkpoint, whether it exists or not. `folder` is its place, `undo`, `next`
    and `reverting` its three states."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model = checkpoint.path
        self.files = [file.name for file in checkpoint.files]
        self.folder = checkpoint.journal
        self.undo = self.folder / UNDO
        self.next = self.folder / NEXT
        self.reverting = self.folder / REVERTING

    def merged(self) -> Record | None:
        """What has been merged; None where nothing is."""
        return Record.load(self.undo) if self.undo.exists() else None

    def inputs(self, record: Record | None) -> list[Input]:
        """The deltas merged so far, to be merged again with more.

        Raises MissingFileError for one that is gone and JournalError for one that is another.
        """
        found = []
        for each in record.merged if record is not None else ():
            path = self.folder / each.file
            if not path.exists():
                raise MissingFileError(
                    f"{path} is missing, which was merged before; a further merge needs it (deltakit "
                    f"revert {self.model} does not)"
                )
            if _name(path.read_bytes()) != each.file:
                raise JournalError(f"{path} is not the delta that was merged before")
            found.append(Input(each.label, None, sdelta.load(path), each.weight))
        return found

    def begin(self, deltas: Mapping[str, bytes], record: bytes) -> None:
        """Put a merge that is about to be written on the disk: its deltas, by the names of their
        files, then its record."""
        with describing(self.folder):
            self.folder.mkdir(exist_ok=True)
        sync(self.folder.parent)
        for name, data in deltas.items():
            write_bytes(self.folder / name, data)
        write_bytes(self.next, record)

    def commit(self) -> None:
        """The merge that has begun is in the weights, and they are on the disk."""
        self._rename(self.next, self.undo)
        self.prune()

    def roll_back(self) -> None:
        """The weights are as they were before the merge that had begun, or was about to."""
        self._remove(self.next)
        self.prune()

    def begin_revert(self, record: Record) -> None:
        """A revert is about to be written, of the record that is there or of one from elsewhere."""
        if self.undo.exists():
            self._rename(self.undo, self.reverting)
            return
        with describing(self.folder):
            self.folder.mkdir(exist_ok=True)
        sync(self.folder.parent)
        write_bytes(self.reverting, record.encode())

    def end_revert(self) -> None:
        """The weights are the base's again, and on the disk."""
        self._remove(self.reverting)
        self.prune()

    def prune(self) -> None:
        """Remove what is of no more use: deltas that no record names, files of killed processes,
        and the folder when nothing is merged."""
        if not self.folder.is_dir():
            return
        used = set()
        for path in self._states():
            used |= {path.name, *(each.file for each in _described(path).merged)}
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in used:
                path.unlink()
        if not used:
            with suppress(OSError):  # something of somebody else's is in there
                self.folder.rmdir()
                sync(self.folder.parent)

    def refuse_others(self) -> None:
        """Raise JournalError where another journal tells of the same weight files, as when they
        were merged into through the index and are now addressed one by one."""
        for folder in sorted(self.folder.parent.glob(f"*{SUFFIX}")):
            other = folder.name.removesuffix(SUFFIX)
            for name in (UNDO, NEXT, REVERTING):
                if folder == self.folder or not (folder / name).exists():
                    continue
                shared = [f for f in _described(folder / name).files if f in self.files]
                if shared:
                    raise JournalError(
                        f"{shared[0]} was merged into as a part of {folder.with_name(other)} "
                        f"(journal {folder}); merge into or revert that one"
                    )

    def _states(self) -> list[Path]:
        return [path for path in (self.undo, self.next, self.reverting) if path.exists()]

    def _rename(self, old: Path, new: Path) -> None:
        old.replace(new)
        sync(self.folder)

    def _remove(self, path: Path) -> None:
        if path.exists():
            path.unlink()
            sync(self.folder)


def kept(plan: Plan) -> tuple[list[Merged], dict[str, bytes]]:
    """The deltas of a merge as the journal keeps them, in order, and the bytes of their files.

    Steps of unmasking are of no use to later merges, and extras and configuration that have lost
    to others must not come up again.
    """
    merged, files = [], {}
    for each in plan.inputs:
        extras = {n: a for n, a in each.delta.extras.items() if _same(a, plan.extras[n])}
        data = sdelta.encode(replace(each.delta, extras=extras, config={}), order=False)
        merged.append(Merged(each.label, each.weight, _name(data)))
        files[merged[-1].file] = data
    return merged, files


def _same(a: Array, b: Array) -> bool:
    return a.tobytes() == b.tobytes()


def _name(data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()[:32]}.sdelta"


def _described(path: Path) -> Record:
    with sdelta.SdeltaFile(path) as file:
        return described(file.provenance, path)
