"""Locks that keep other deltakit processes out, and that the system frees when one dies."""

from __future__ import annotations

import sys


def try_lock(handle: int) -> bool:
    """Take the exclusive lock of an open file or folder; whether it could be had.

    handle: a file descriptor, which holds the lock until it is closed. On Windows, whose locks would
    keep readers out too, nothing is taken and the answer is True.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
