"""Memory of the process, and its peak over a piece of work, as system and accelerator count it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """How far memory rises above what is in use when this is made, in bytes.

    On Linux the process's resident size, whose peak is reset here; elsewhere the peak over the
    process's whole life, which tells something in a fresh process only. On CUDA what torch has
    allocated on the current device.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        elif _RESET.exists():
            _RESET.write_text("5")
        self._before = torch.cuda.memory_allocated() if self._cuda else resident_bytes()

    def above(self) -> int | None:
        """The rise so far; None where the system tells nothing (Windows)."""
        peak = torch.cuda.max_memory_allocated() if self._cuda else peak_resident_bytes()
        return None if peak is None or self._before is None else max(0, peak - self._before)


def memory_in_use() -> dict[str, int]:
    """Bytes in use and at most so far, of the process and of the current CUDA device's tensors.

    What the system does not tell is left out.
    """
    told = {"resident_bytes": resident_bytes(), "peak_resident_bytes": peak_resident_bytes()}
    if torch.cuda.is_available():
        told["cuda_bytes"] = torch.cuda.memory_allocated()
        told["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return {name: size for name, size in told.items() if size is not None}


def resident_bytes() -> int | None:
    """Resident size of this process; its peak on macOS, None on Windows."""
    return _resident("VmRSS")


def peak_resident_bytes() -> int | None:
    """Largest resident size since `PeakMemory` was made, elsewhere than on Linux since the start."""
    return _resident("VmHWM")


def _resident(key: str) -> int | None:
    if _STATUS.exists():
        lines = _STATUS.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
