"""A partial folder that several processes fill at once, perhaps on several machines.

Each takes part under a shared lock, and the one that finds itself alone when it has done its part
puts the folder in its place if nothing is missing. Where the file system has no locks, two may come
to that point together: what they write then is equal, and one of the two renames wins.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

from deltakit.errors import OutputError
from deltakit.formats.atomic import describing
from deltakit.formats.finished_mark import is_marked, write_mark
from deltakit.formats.locks import try_lock, unlock
from deltakit.formats.partial_folder import (
    partial_folder,
    partial_folders,
    publish,
    real_target,
)

_LEFT = "what was finished is kept, run the same job again"
_PATIENCE = 5.0  # seconds


class SharedFolder:
    """A partial folder in which this process takes part; made by `joined_folder`.

    path: of the partial folder, in which files are written through `placing`. is_busy: whether
    another process has it for itself, to put it in its place or to do all the work alone.
    """

    def __init__(self, path: Path, target: Path, key: str, handle: int | None) -> None:
        self.path = path
        self._target, self._key, self._handle = target, key, handle
        self.is_busy = handle is not None and not _shares(handle)

    @property
    def is_done(self) -> bool:
        """Whether another process has put the folder in its place."""
        return is_marked(self._target, self._key)

    @property
    def is_there(self) -> bool:
        """Whether the folder is still the one that this process joined."""
        if self._handle is None:
            return self.path.is_dir()
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._handle))
        except FileNotFoundError:
            return False

    def is_alone(self) -> bool:
        """Let go of the folder, and take it for this process; whether nobody else is at work in it.

        Whoever is, comes here later than this process, and finds all that this one has done.
        """
        if self._handle is not None:
            unlock(self._handle)  # for all to see, should the next lock be refused
            if try_lock(self._handle) is False:
                return False
        if self.is_there:
            list(self.path.iterdir())  # network file systems look for what others wrote just now
            return True
        return False

    def publish(self, names: Iterable[str]) -> bool:
        """Move the folder onto the target, once it `is_alone`; whether it was this process that did.

        names: of the files in it by which the target is known again.
        """
        try:
            write_mark(self._target, self._key, self.path, names)
            publish(self.path, self._target)
        except FileNotFoundError:
            if is_marked(self._target, self._key):  # without locks another one may be quicker
                return False
            raise
        return True


@contextmanager
def joined_folder(path: str | os.PathLike[str], key: str) -> Iterator[SharedFolder | None]:
    """Take part in the work `key` on `path`; None where it is done and in its place. A block whose
    folder another process puts there meanwhile just ends.

    key: as for `deltakit.formats.partial_folder.resuming_folder`, whose work this goes on with, and
    which goes on with this. What was finished stays there, whatever happens. Raises
    MissingFileError when the parent folder does not exist, and OutputError when the system refuses
    to write or where there is a partial folder of other work on `path`.
    """
    target = real_target(path)
    partial = partial_folder(target, key)
    with describing(target, _LEFT):
        others = [left for left in partial_folders(target) if left != partial]
        if others:
            raise OutputError(
                f"{others[0]} holds a part of {target.name} made of other inputs or with other "
                "options; run its jobs, or remove it, or give another output"
            )
        if is_marked(target, key):
            yield None
            return
        partial.mkdir(exist_ok=True)
        handle = None if sys.platform == "win32" else _opened(partial)
        try:
            folder = SharedFolder(partial, target, key, handle)
            if is_marked(target, key):  # since just now
                with suppress(OSError):
                    partial.rmdir()
                yield None
                return
            try:
                yield folder
            except BaseException as error:
                if isinstance(error, FileNotFoundError) and is_marked(target, key):
                    return  # without locks another process may publish what this one still writes
                if folder.is_alone():
                    with suppress(OSError):  # unless something is in it
                        partial.rmdir()
                raise
        finally:
            if handle is not None:
                os.close(handle)


def _opened(partial: Path) -> int:
    """The folder, which is made again where it was moved to its place meanwhile."""
    while True:
        with suppress(FileNotFoundError):
            return os.open(partial, os.O_RDONLY)
        partial.mkdir(exist_ok=True)


def _shares(handle: int) -> bool:
    """Whether the folder can be shared; another job that only looks whether all is there has it for
    itself for a moment."""
    last = monotonic() + _PATIENCE
    while try_lock(handle, shared=True) is False:
        if monotonic() > last:
            return False
        sleep(_PATIENCE / 200)
    return True
