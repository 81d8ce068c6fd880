"""Locks that keep other deltakit processes out, and that the system frees when one dies."""

from __future__ import annotations

import sys


def try_lock(handle: int) -> bool | None:
    """Take the exclusive lock of an open file or folder; whether it could be had.

    handle: a file descriptor, which holds the lock until it is closed. None where nothing can be
    locked: on Windows, whose locks would keep readers out too, and on some network file systems.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
