"""The machine and the libraries that a run trains with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from deltakit import __version__

_PACKAGES = ("torch", "transformers", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """Of deltakit, Python and the libraries that the results depend on."""
    known = {name: version(name) for name in _PACKAGES}
    return {"deltakit": __version__, "python": platform.python_version(), **known}


def environment() -> dict[str, Any]:
    """System, processor, accelerator, threads and memory (bytes); nothing that names the machine."""
    return {
        "system": platform.platform(terse=True),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
    }


def _processor() -> str:
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not told on Windows
        return None
