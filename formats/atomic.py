"""Writing files so that a reader sees the whole new file or the old one, never a half."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from deltakit.errors import DeltakitError, MissingFileError, OutputError, OutputExistsError
from deltakit.formats.locks import try_lock

_TEMPORARY = ".deltakit.tmp"  # so that no other program's files are taken for ours
_UMASK = Lock()  # two threads that set it at once would leave it set


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success fsync it and move it onto `path`.

    On any exception, KeyboardInterrupt included, the temporary file is removed and `path` is left
    as it was; that of a process that was killed is removed by the next one that writes `path`.
    Raises MissingFileError when the folder does not exist and OutputError when the system refuses
    to write.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise MissingFileError(f"cannot write {target}: folder {target.parent} does not exist")
    with describing(target), placing(target) as temporary:
        yield temporary


@contextmanager
def placing(target: Path) -> Iterator[Path]:
    """`replacing` for a file inside a larger output: what the system says is left as it is."""
    _remove_stale(target)
    with _temporary(target) as temporary:
        try:
            temporary.chmod(0o666 & ~umask())  # mkstemp makes files private; outputs are ordinary
            yield temporary
            sync(temporary)
            temporary.replace(target)
            sync(target.parent)
        except BaseException:
            with suppress(FileNotFoundError):
                temporary.unlink()
            raise


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """Make an empty file beside `target`, locked while this process lives and writes it."""
    prefix, folder = f".{target.name}.", target.parent
    locked: bool | None = False
    while locked is False:
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=_TEMPORARY, dir=folder)
        locked = try_lock(handle)
        if locked and not Path(name).exists():
            locked = False  # another process has just taken it for stale
        if not locked:
            os.close(handle)
    try:
        yield Path(name)
    finally:
        if locked:
            os.close(handle)


def umask() -> int:
    """The bits of permissions that new files do not get; it can only be read by setting it."""
    with _UMASK:
        found = os.umask(0)
        os.umask(found)
        return found


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left of files that they were writing into a folder that no
    other process is writing to any more."""
    for path in folder.rglob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def _remove_stale(target: Path) -> None:
    """Remove the temporary files for `target` that no living process has locked."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.\w+{re.escape(_TEMPORARY)}")
    for path in target.parent.iterdir():
        if not ours.fullmatch(path.name):
            continue
        with suppress(OSError):  # another process removes it as well, or it is somebody else's
            handle = os.open(path, os.O_RDWR)
            try:
                if try_lock(handle):
                    path.unlink()
            finally:
                os.close(handle)


@contextmanager
def describing(target: Path, left: str = "nothing was left behind") -> Iterator[None]:
    """Turn what the system says against writing `target` into an OutputError of one line, which
    ends with what is `left`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DeltakitError):
            raise
        raise OutputError(f"cannot write {target}: {error.strerror or error}; {left}") from error


def sync(path: Path) -> None:
    """fsync a file or, where the system can, a folder."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a whole small file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def refuse_existing(path: str | os.PathLike[str], force: bool = False) -> None:
    """Raise OutputExistsError when `path` exists and `force` is not given.

    Devices and pipes are refused all the same: moving a file onto /dev/null would remove it.
    """
    target = Path(path)
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise OutputError(f"{path} is neither a file nor a folder; give another output")
    if not force and target.exists():
        raise OutputExistsError(f"{path} exists; give another output or --force to replace it")
