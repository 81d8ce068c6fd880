"""Cells of a comparison: each one run in a folder and a process of its own, and done only once.

Peak memory belongs to a process, so runs that share one could not be told apart.

python -m deltakit.training.cells CELL     # what the driver starts: trains what CELL/cell.json says
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltakit.errors import DeltakitError, OutputExistsError
from deltakit.formats.atomic import write_bytes
from deltakit.parallel.processes import refuse_several
from deltakit.training.config import TrainConfig
from deltakit.training.config_file import resolve
from deltakit.training.folder import HARMLESS, RunFolder
from deltakit.training.prepare import Say

_STOP = 5  # seconds between the asking and the telling of a process to stop


@dataclass(frozen=True, slots=True)
class Cell:
    """One run. name: what it is called; peer: the peer to train, None for deltakit itself."""

    name: str
    config: TrainConfig
    peer: str | None = None

    @property
    def folder(self) -> Path:
        """The cell's own folder."""
        return Path(self.config.output_dir)

    def as_dict(self) -> dict[str, Any]:
        """What cell.json says."""
        return {"peer": self.peer, "settings": self.config.as_dict()}


def run_cells(cells: Iterable[Cell], *, force: bool, say: Say) -> list[dict[str, Any]]:
    """The record of every cell (its metrics.json), run now where it has none yet.

    A cell that fails has {"error": one line} instead, and the others go on. An interrupted one
    resumes from its newest checkpoint. force: runs all anew. say: takes a note per cell. Raises
    OutputExistsError where a folder holds a run of other settings, and ConfigError in a process
    launched with others.
    """
    refuse_several("a comparison or sweep")
    given = list(cells)
    for cell in given:
        _check(cell, force=force)
    return [_record(cell, say) for cell in given]


def _check(cell: Cell, *, force: bool) -> None:
    """Leave the folder as it is if it holds this cell, clear it if told, and refuse otherwise."""
    told = cell.folder / "cell.json"
    if force and told.exists():
        shutil.rmtree(cell.folder)
    if told.exists():
        before, now = _essential(json.loads(told.read_text())), _essential(cell.as_dict())
        differing = [name for name, value in now.items() if value != before.get(name)]
        if differing:
            raise OutputExistsError(
                f"{cell.folder} holds a run with another {differing[0]} "
                f"({before.get(differing[0])!r}, not {now[differing[0]]!r}); give another output "
                "folder, or --force to replace it"
            )
    elif RunFolder(cell.folder).config.exists():
        raise OutputExistsError(f"{cell.folder} holds a run of its own; give another output folder")


def _essential(told: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a result to stand; folders may be named another way."""
    settings = {k: v for k, v in told["settings"].items() if k not in (*HARMLESS, "output_dir")}
    return {"peer": told["peer"], **settings}


def _record(cell: Cell, say: Say) -> dict[str, Any]:
    metrics = RunFolder(cell.folder).metrics
    if not metrics.exists():
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(cell.folder / "cell.json", json.dumps(cell.as_dict(), indent=2).encode())
        error = _run(cell.folder)
        if error is not None:
            say(f"{cell.name}: {error}")
            return {"error": error}
    record: dict[str, Any] = json.loads(metrics.read_text())
    shown = ", ".join(f"{name} {value:.4f}" for name, value in record["final"]["metrics"].items())
    say(f"{cell.name}: {shown}")
    return record


def _run(folder: Path) -> str | None:
    """Train a cell in a new process; its last words where it failed."""
    log = folder / "cell.log"
    with log.open("wb") as stream:
        command = [sys.executable, "-m", "deltakit.training.cells", str(folder)]
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        try:
            process.wait()
        except BaseException:
            _stop(process)
            raise
    if process.returncode == 0:
        return None
    words = log.read_text(errors="replace").strip().splitlines()
    return words[-1] if words else f"ended with exit code {process.returncode}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let a run save itself, which Ctrl-C has asked it to already where it came from a terminal."""
    try:
        process.wait(_STOP)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


def train_cell(folder: Path) -> None:
    """Train what cell.json in the folder says, in this process."""
    told = json.loads((folder / "cell.json").read_text())
    config = resolve({**told["settings"], "output_dir": str(folder)}, {})
    if told["peer"] is not None:
        from deltakit.training.peer_run import train_peer

        train_peer(told["peer"], config, _tell)
        return
    from deltakit.training.run import train

    resume = bool(RunFolder(folder).checkpoints())
    outcome = train(config, resume=resume, force=not resume, say=_tell, quiet=False)
    if outcome.record is None:
        sys.exit(f"interrupted and saved at step {outcome.step}")


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    try:
        train_cell(Path(sys.argv[1]))
    except DeltakitError as problem:
        sys.exit(" ".join(str(problem).split()))
