"""Locks that keep other deltakit processes out, and that the system frees when one dies."""

from __future__ import annotations

import sys
from contextlib import suppress


def try_lock(handle: int, *, shared: bool = False) -> bool | None:
    """Take the exclusive lock of an open file or folder, or one `shared` with others that want no
    more; whether it could be had.

    handle: a file descriptor, which holds the lock until it is closed. A lock that it holds already
    is let go of first, also where the new one cannot be had. None where nothing can be
    locked: on Windows, whose locks would keep readers out too, and on some network file systems.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def unlock(handle: int) -> None:
    """Let go of the lock that an open file or folder holds, if it holds one."""
    if sys.platform != "win32":
        import fcntl

        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
