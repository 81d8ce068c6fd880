"""The real commands over checkpoints of any size, whose weights are holes of sparse files."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

import numpy as np
import scaling_arithmetic as cost
from random_delta import random_delta
from scaling_shapes import MODELS, Model

from deltakit.delta import SparseDelta
from deltakit.formats import sdelta
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.safetensors_header import Entry, render

SHARD = 5e9  # bytes of a weight file at most, as most large checkpoints have them
TOUCHED = 2000  # tensors at most: of small ones samples of the base are all of the file
FREE = 10e9  # bytes of the disk that no simulation takes up
CHILD = """
import re, sys
from pathlib import Path
from deltakit.cli.main import main
try:
    main(sys.argv[1:])
finally:
    peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
    print(f"\\n{1024 * int(peak)}", file=sys.stderr)
"""


@dataclass(frozen=True)
class Run:
    """What one command took: seconds, peak resident bytes, bytes of the disk."""

    seconds: float
    peak: int
    grown: int


def run(folder: Path, *arguments: object) -> Run:
    """Run `deltakit` on files in a folder, in a fresh process."""
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    before, start = on_disk(folder), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"deltakit {arguments[0]}: {done.stderr.strip()}")
    return Run(seconds, int(done.stderr.split()[-1]), on_disk(folder) - before)


def on_disk(folder: Path) -> int:
    """Bytes that the files of a folder take up on the disk; holes take up none."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())


def write_model(folder: Path, model: Model) -> None:
    """Weight files with true headers and holes for weights, and their index."""
    folder.mkdir()
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in model.tensors.items():
        if files[-1] and size + 2 * prod(shape) > SHARD:
            files.append({})
            size = 0
        files[-1][name] = shape
        size += 2 * prod(shape)
    weight_map = {}
    for number, shapes in enumerate(files, 1):
        path = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        entries, at = {}, 0
        for name, shape in shapes.items():
            entries[name] = Entry("BF16", shape, at, at := at + 2 * prod(shape))
            weight_map[name] = path.name
        with path.open("wb") as file:
            file.write(render(entries, {"format": "pt"}))
            file.truncate(file.tell() + at)
    index = {"metadata": {"total_size": 2 * model.weights}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_delta(path: Path, base: Path, entries: int) -> SparseDelta:
    """A random support, by size over all tensors or every so many of them, with the base's
    identity."""
    checkpoint, rng = Checkpoint(base), np.random.default_rng(0)
    stride = ceil(len(checkpoint.names) / TOUCHED)
    chosen = {name: checkpoint.info(name) for name in checkpoint.names[::stride]}
    total = sum(info.numel for info in chosen.values())
    counts = {name: int(rng.binomial(entries, i.numel / total)) for name, i in chosen.items()}
    delta = random_delta(checkpoint, counts, rng)
    sdelta.save(delta, path)
    return delta


def simulate(size: str, entries: int, folder: Path) -> list[str]:
    """Rows of the report of one model; its files are gone afterwards."""
    model = MODELS[size]
    base, path, out = folder / "base", folder / "delta.sdelta", folder / "merged"
    if shutil.disk_usage(folder).free < cost.PAGE * entries + SHARD + FREE:
        raise SystemExit(f"{folder} lacks the room for {entries:,} entries; give --entries less")
    try:
        write_model(base, model)
        delta = write_delta(path, base, entries)
        k, touched = delta.nnz, sum(tensor.numel for tensor in delta.tensors.values())
        files = sorted(base.glob("*.safetensors"))
        total, jobs = sum(file.stat().st_size for file in files), len(files)
        told = cost.delta_bytes(k, k / touched, len(delta.tensors))
        in_place = cost.pages_with_entries(2 * touched, k / touched)
        in_place += cost.journal_bytes(k, k / touched, len(delta.tensors))
        what = f"{total / 1e9:,.0f} GB in {jobs} files, {len(model.tensors):,} tensors"
        what += f", {k:,} entries in {len(delta.tensors):,} of these"
        sizes = f"{told / 1e6:,.1f} | {path.stat().st_size / 1e6:,.1f}"
        rows = [f"| **{size}**: {what} | | | | |", f"| the delta | {sizes} | | |"]
        commands: dict[str, tuple[float | None, list[object]]] = {
            "inspect": (None, ["inspect", path]),
            "verify --base": (None, ["verify", path, "--base", base]),
            "merge --in-place": (in_place, ["merge", base, path, "--in-place"]),
            "revert": (None, ["revert", base]),
            f"merge --shard 1/{jobs}": (
                total / jobs,
                ["merge", base, path, "-o", out, "--shard", f"1/{jobs}"],
            ),
        }
        for name, (expected, arguments) in commands.items():
            found = run(folder, *arguments)
            print(f"{size} {name}: {found}", file=sys.stderr, flush=True)
            grown = "|" if expected is None else f"{expected / 1e6:,.0f} | {found.grown / 1e6:,.0f}"
            rows.append(f"| {name} | {grown} | {found.seconds:.1f} | {found.peak / 1e6:,.0f} |")
        return rows
    finally:
        for made in folder.iterdir():
            shutil.rmtree(made) if made.is_dir() else made.unlink()


def report(sizes: list[str], entries: int, folder: Path | None) -> str:
    """Arithmetic and measurement side by side, as Markdown."""
    rows = ["| | MB on the disk: arithmetic | measured | seconds | peak MB |"]
    rows.append("| --- | ---: | ---: | ---: | ---: |")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is removed
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        for size in sizes:
            rows += simulate(size, entries, place)
    finally:
        shutil.rmtree(place)
    return "\n".join(rows)
