"""What the tests of job arrays share: a checkpoint in many files, its delta, and jobs as processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_factory import random_array, write_sharded
from terminal_lab import ROOT

import deltakit as dk
from deltakit.dtypes import Array
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import identify

SIZES = (700, 90, 1300, 40, 600)  # rows of the two tensors in each weight file
COLUMNS = 11
# A job that kills itself before the file operation DIES, counted from 0; after it where it has fewer.
JOB = """
import json, os, signal, sys
import deltakit as dk
function, positional, named, dies = json.loads(sys.argv[1])
work = getattr(dk, function)
seen = 0
def count(event, arguments):
    global seen
    if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        if seen == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1
sys.addaudithook(count)
report = work(*positional, **named)
print(json.dumps(report.as_dict()))
"""


def arrays(seed: int = 0) -> list[dict[str, Array]]:
    """The tensors of each weight file: names that sort otherwise than the files do."""
    rng = np.random.default_rng(seed)
    return [
        {
            f"{letter}.{number}": random_array(rng, (rows, COLUMNS), np.float32)
            for letter in ("w", "b")
        }
        for number, rows in enumerate(SIZES)
    ]


def make_base(folder: Path, shards: Sequence[Mapping[str, Array]] | None = None) -> Path:
    """A folder of five weight files with a configuration and a tokenizer."""
    write_sharded(folder, list(shards or arrays()), {"num_labels": 2})
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make_delta(path: Path, base: Path, seed: int = 1) -> Path:
    """Entries in most tensors of all files, a head and its configuration, and the base's identity."""
    rng = np.random.default_rng(seed)
    checkpoint = Checkpoint(base)
    tensors = {
        name: dk.TensorDelta(
            name=name,
            shape=info.shape,
            dtype=info.dtype,
            mode="add",
            indices=np.sort(rng.choice(info.numel, 30, replace=False)),
            values=rng.standard_normal(30),
        )
        for name, info in checkpoint.tensors.items()
        if name != "b.3"
    }
    identity = identify(checkpoint, {name: t.indices for name, t in tensors.items()})
    extras = {"head.weight": np.ones((3, COLUMNS), np.float32)}
    dk.save(
        dk.SparseDelta(tensors=tensors, extras=extras, base=identity, config={"num_labels": 3}),
        path,
    )
    return path


def start(
    function: str, *positional: object, dies: int = -1, **named: Any
) -> subprocess.Popen[str]:
    """A process that calls a function of deltakit with paths and plain values, and prints its
    report; it dies by SIGKILL before the file operation of this number."""
    given = [function, [str(path) for path in positional], named, dies]
    return subprocess.Popen(
        [sys.executable, "-c", JOB, json.dumps(given)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> dict[str, Any] | None:
    """The report of a process once it has ended; None where it was killed."""
    out, err = process.communicate()
    if process.returncode == -signal.SIGKILL:
        return None
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def files_of(path: Path) -> dict[str, bytes]:
    """Name -> bytes of a file, or of all files in a folder."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
