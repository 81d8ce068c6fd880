"""The parts of a diff that the jobs of a job array write, and the delta that they are joined into.

A part is an `.sdelta` file of some tensors beside the output: `tuned.part-00003-of-00008.sdelta`. Its
provenance holds the key of all that the output depends on; only parts of one key are joined.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from deltakit.diffing.checkpoint_entries import Sides
from deltakit.diffing.fill import (
    Progress,
    Wanted,
    add_entries,
    add_extras,
    differing,
    finish,
)
from deltakit.diffing.part_files import PartFiles, part_record
from deltakit.errors import DeltakitError
from deltakit.formats.atomic import refuse_existing
from deltakit.formats.finished_mark import is_marked, write_mark
from deltakit.formats.locks import try_lock
from deltakit.formats.sdelta import SdeltaFile
from deltakit.formats.sdelta_stream import SdeltaStream, sdelta_stream
from deltakit.identity import identify


class PartedDiff:
    """A diff to the file `out` in parts; `shares` are the tensors of each, of `sides.names`."""

    def __init__(
        self, out: Path, sides: Sides, wanted: Wanted, shares: Sequence[Sequence[str]]
    ) -> None:
        self._out, self._sides, self._wanted, self._shares = out, sides, wanted, shares
        self.paths = [
            out.with_name(f"{out.stem}.part-{n:05d}-of-{len(shares):05d}{out.suffix}")
            for n in range(1, len(shares) + 1)
        ]
        versions = [(s.version(), s.model_id, s.revision) for s in (sides.base, sides.tuned)]
        what = repr((versions, sides.lacking, wanted))
        self._key = hashlib.sha256(what.encode()).hexdigest()[:16]

    @property
    def is_joined(self) -> bool:
        """Whether the output is there, made of these parts."""
        return is_marked(self._out, self._key)

    def refuse_other(self, force: bool) -> None:
        """Raise OutputExistsError where something else stands at the output, unless `force`."""
        refuse_existing(self._out, force or self.is_joined)

    def is_done(self, number: int) -> bool:
        """Whether a part, counted from 1, or all of the output is there."""
        return self._is_part(self.paths[number - 1]) or self.is_joined

    def write(self, number: int, workers: int | None, progress: Progress | None) -> None:
        """Write a part, counted from 1. The largest changes of all are among the largest of each."""
        share, wanted = self._shares[number - 1], self._wanted
        if wanted.count is not None:  # which of them stay is seen when they are joined
            wanted = replace(wanted, mode="set", keep_base=True)
        with sdelta_stream(self.paths[number - 1]) as stream:
            found = differing(self._sides, share, workers, progress)
            seen = add_entries(stream, found, wanted)
            add_extras(stream, self._sides, share)
            part = {"key": self._key, "number": number, "of": len(self.paths), "differing": seen}
            provenance = {"operation": "diff", "mode": wanted.mode, "part": part}
            stream.finish(identify(self._sides.base, {}), {}, provenance)

    def missing(self) -> list[Path]:
        """The parts that are still to come before they can be joined."""
        if self.is_joined:
            return []
        there = set(self._out.parent.iterdir())  # network file systems look for the newest then
        gone = [path for path in self.paths if path not in there]
        return gone or [path for path in self.paths if not self._is_part(path)]

    def join(self) -> tuple[SdeltaStream, int] | None:
        """Join the parts, which are all there, into the output, and remove them.

        What was written, and how many elements differ; None where another process does this, or has
        done it.
        """
        try:
            with _locked(self._out.with_name(f".{self._out.name}.{self._key}.joining")) as is_mine:
                if self.is_joined or not is_mine:
                    return None
                with sdelta_stream(self._out) as stream:
                    differ = self._fill(stream)
                write_mark(self._out, self._key, self._out, [""])
                return stream, differ
        except FileNotFoundError:
            if self.is_joined:
                return None
            raise
        finally:
            if self.is_joined:
                self._clear()

    def _fill(self, stream: SdeltaStream) -> int:
        with PartFiles(self.paths) as parts:
            if self._wanted.count is None:
                for tensor, known in parts.tensors():
                    stream.add(tensor, known)
            else:
                add_entries(stream, parts.tensors(), self._wanted)
            for name, array in parts.extras():
                stream.add_extra(name, array)
            finish(stream, self._sides, self._wanted, parts.differing)
            return parts.differing

    def _clear(self) -> None:
        for path in self.paths:
            if self._is_part(path):
                path.unlink(missing_ok=True)

    def _is_part(self, path: Path) -> bool:
        try:
            with SdeltaFile(path) as file:
                record = part_record(file)
        except (DeltakitError, OSError):
            return False
        return (record.get("key"), record.get("of")) == (self._key, len(self.paths))


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether this process has a lock for itself, or none is needed, for the length of a `with`.

    path: of a file that is there meanwhile. Who comes when it is removed finds the work done.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    is_mine = try_lock(handle) is not False
    try:
        yield is_mine
    finally:
        if is_mine:
            path.unlink(missing_ok=True)
        os.close(handle)
