"""The files of a checkpoint that hold the state of training, one per process that has its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

STATE_FILE = "optimizer.pt"  # the Trainer's own name; it holds the support and values too
_PART = re.compile(r"optimizer\.(\d+)\.pt")


def write_part(state: dict[str, Any], folder: Path, rank: int) -> None:
    """Write the state of a process other than the first, whose file the Trainer writes."""
    if rank:
        torch.save(state, folder / f"optimizer.{rank}.pt")


def read_states(folder: Path) -> list[dict[str, Any]]:
    """The states in a checkpoint, by rank; one unless each process had its own."""
    parts = [(int(m[1]), path) for path in folder.iterdir() if (m := _PART.fullmatch(path.name))]
    files = [folder / STATE_FILE, *(path for _, path in sorted(parts))]
    return [torch.load(file, map_location="cpu", weights_only=True) for file in files]
