"""Programs on a terminal of their own, as a person would have them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DELTAKIT = [sys.executable, "-m", "deltakit"]
PLAIN = {"NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE"}  # what conftest or CI may set

# Where the tests run in the background of a shell, their children ignore SIGINT at first.
INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"


def environment(**variables: str) -> dict[str, str]:
    """This process's environment with deltakit to import, no word about colours, and `variables`."""
    kept = {name: value for name, value in os.environ.items() if name not in PLAIN}
    return {**kept, "PYTHONPATH": str(ROOT), "TERM": "xterm", **variables}


def on_terminal(
    command: Sequence[str | Path],
    typed: str = "",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> tuple[int, str]:
    """Run a program on a terminal; its exit code, and all that it wrote, to stdout or stderr.

    typed: what is on the way to it from the beginning, as if somebody typed ahead.
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100)) if hasattr(termios, "tcsetwinsize") else None
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=dict(env or environment()),
        cwd=cwd,
        start_new_session=True,
    )
    os.close(theirs)
    os.write(ours, typed.encode())
    seen = b""
    while True:
        try:
            seen += (new := os.read(ours, 65536))
        except OSError:  # Linux says so where the other end is closed
            break
        if not new:
            break
    os.close(ours)
    return process.wait(), seen.decode(errors="replace")
