"""Merging 100,000 entries in place: against the size of the model, and against raw writes.

    python benchmarks/in_place.py [sizes] [huge] [--rounds 5] [--folder DIR]

sizes: bfloat16 checkpoints of 0.5 GB and 2.2 GB with the tensors of a Llama of 22 layers, merged
into, by the function and by the command, and reverted in alternating rounds; raw writes to the same
positions tell how much of the difference is due to more pages that hold entries. huge: an 800 GB
checkpoint of sparse files (holes), one tensor of which has more than 2^32 elements; merge and revert
against `pwrite` of the same two bytes at the same positions of a second such checkpoint and one
fsync per file. The support is uniformly random, so nearly every entry has a page of its own. Times
are medians of wall-clock seconds, to the moment the data are on the disk, and of processor seconds,
which a busy machine leaves as they are; what was merged is compared with the expected words.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import ml_dtypes
import numpy as np
from random_delta import random_delta

from deltakit.delta import SparseDelta
from deltakit.dtypes import Array
from deltakit.formats import sdelta
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.safetensors_header import Entry, render
from deltakit.in_place.merge import merge_in_place
from deltakit.in_place.revert import revert

ENTRIES = 100_000
HUGE_SHARDS = 40  # of 20 GB
Shapes = Mapping[str, tuple[int, ...]]
Times = dict[str, list[tuple[float, float]]]  # wall-clock and processor seconds


def llama(width: int, inner: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama of 22 layers."""
    shapes: dict[str, tuple[int, ...]] = {"embed": (vocabulary, width), "head": (vocabulary, width)}
    for layer in range(22):
        shapes |= {f"{layer}.{name}": (width, width) for name in "qo"}
        shapes |= {f"{layer}.{name}": (width // 8, width) for name in "kv"}
        shapes |= {f"{layer}.{name}": (inner, width) for name in ("up", "gate", "down")}
        shapes |= {f"{layer}.norm{n}": (width,) for n in (1, 2)}
    return shapes


def write_checkpoint(path: Path, shapes: Shapes, filling: bytes = b"") -> Path:
    """A bfloat16 file of these tensors, filled by repeating `filling`, or a hole without it."""
    entries, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape, dtype=np.int64))
        entries[name] = Entry("BF16", shape, at, at + size)
        at += size
    with path.open("wb") as file:
        file.write(render(entries, {"format": "pt"}))
        end = file.tell() + at
        while filling and file.tell() < end:
            file.write(filling[: end - file.tell()])
        file.truncate(end)
    return path


def write_huge(folder: Path) -> Path:
    """800 GB in shards of 20 GB; the first is one tensor of 10^10 elements."""
    folder.mkdir()
    weight_map = {}
    for number in range(HUGE_SHARDS):
        names = ["big"] if number == 0 else [f"{number}.{n}" for n in range(5)]
        shapes = {name: (100_000, 100_000 // len(names)) for name in names}
        file = f"model-{number:05d}.safetensors"
        write_checkpoint(folder / file, shapes)
        weight_map |= dict.fromkeys(names, file)
    quoted = ", ".join(f'"{name}": "{file}"' for name, file in weight_map.items())
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{quoted}}}}}')
    return folder


def drawn(base: Checkpoint, rng: np.random.Generator) -> SparseDelta:
    """ENTRIES entries, in each tensor as many as its share of the weights."""
    share = ENTRIES / base.total_weights
    counts = {name: max(1, round(share * info.numel)) for name, info in base.tensors.items()}
    return random_delta(base, counts, rng, 1.0)


def words_at(model: Path, delta: SparseDelta) -> dict[str, Array]:
    """The words of a model at the entries of a delta."""
    checkpoint = Checkpoint(model)
    return {name: checkpoint.gather(name, t.indices) for name, t in delta.tensors.items()}


def check(model: Path, delta: SparseDelta, before: Mapping[str, Array], *, merged: bool) -> None:
    """Stop unless the entries are what they were before, or that plus the delta."""
    for name, found in words_at(model, delta).items():
        expected = before[name]
        if merged:
            floats = expected.view(ml_dtypes.bfloat16).astype(np.float32)
            floats = floats + delta.tensors[name].values
            expected = floats.astype(ml_dtypes.bfloat16).view(np.uint16)
        if not np.array_equal(found, expected):
            raise SystemExit(f"{model}: tensor {name!r} is wrong")


def after(delta: SparseDelta) -> dict[str, Array]:
    """The words that a base of zeros gets."""
    return {
        name: tensor.values.astype(ml_dtypes.bfloat16).view(np.uint16)
        for name, tensor in delta.tensors.items()
    }


def timed(times: Times, what: str, action: Callable[[], object]) -> None:
    """Add the wall-clock and processor seconds of one call to `times`."""
    os.sync()
    begun, used = time.perf_counter(), sum(os.times()[:4])
    action()
    taken = time.perf_counter() - begun, sum(os.times()[:4]) - used
    times.setdefault(what, []).append(taken)


def tell(times: Times) -> dict[str, tuple[float, float]]:
    """Print the times and return their medians."""
    found = {}
    for what, taken in times.items():
        wall, used = zip(*taken, strict=True)
        print(
            f"{what:>20}: {median(wall):.3f} s (from {min(wall):.3f} to {max(wall):.3f}), "
            f"processor {median(used):.3f} s"
        )
        found[what] = (median(wall), median(used))
    return found


def places(delta: SparseDelta) -> str:
    """How many pages hold entries, and how many runs of neighbouring pages these are."""
    pages = [np.unique(t.indices // 2048) for t in delta.tensors.values()]
    runs = sum(1 + np.count_nonzero(np.diff(each) > 1) for each in pages)
    return f"{delta.nnz:,} entries on {sum(map(len, pages)):,} pages in {runs:,} runs"


def sizes(folder: Path, rounds: int) -> None:
    """Time against the size of the model."""
    rng = np.random.default_rng(0)
    filling = (rng.standard_normal(2**20, np.float32) * 0.02).astype(ml_dtypes.bfloat16).tobytes()
    cases = {}
    for what, shapes in (
        ("0.5 GB", llama(960, 2656, 16_000)),
        ("2.2 GB", llama(2048, 5632, 32_000)),
    ):
        model = write_checkpoint(folder / f"{what}.safetensors", shapes, filling)
        delta = drawn(Checkpoint(model), rng)
        sdelta.save(delta, folder / f"{what}.sdelta")
        cases[what] = (model, delta, words_at(model, delta))
        print(f"{what}: {model.stat().st_size:,} bytes, {places(delta)}")
    times: Times = {}
    for number in range(rounds + 1):
        if number == 1:
            times = {}  # the first round does not count
        for what, (model, delta, before) in cases.items():
            file = folder / f"{what}.sdelta"
            command = [sys.executable, "-m", "deltakit", "merge", model, file, "--in-place", "-q"]
            merges: dict[str, Callable[[], object]] = {
                "merge": partial(merge_in_place, model, file),
                "command": partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL),
            }
            for how, action in merges.items():
                timed(times, f"{how} {what}", action)
                check(model, delta, before, merged=True)
                timed(times, f"revert {what}", partial(revert, model))
                check(model, delta, before, merged=False)
            timed(times, f"raw writes {what}", partial(raw_writes, model, delta, after(delta)))
            raw_writes(model, delta, before)
    found = tell(times)
    for what in ("merge", "command", "revert", "raw writes"):
        pairs = zip(found[f"{what} 2.2 GB"], found[f"{what} 0.5 GB"], strict=True)
        wall, used = (large / small for large, small in pairs)
        print(f"{what}, 2.2 GB / 0.5 GB: {wall:.2f}, processor {used:.2f}")


def raw_writes(model: Path, delta: SparseDelta, words: Mapping[str, Array]) -> None:
    """What no merge can do without: the words at their places, and fsync."""
    checkpoint = Checkpoint(model)
    for shard in checkpoint.shards.values():
        handle = os.open(shard.path, os.O_RDWR)
        for name, info in shard.tensors.items():
            places = (info.offset + 2 * delta.tensors[name].indices).tolist()
            data = words[name].tobytes()
            for at, place in enumerate(places):
                os.pwrite(handle, data[2 * at : 2 * at + 2], place)
        os.fsync(handle)
        os.close(handle)


def huge(folder: Path, rounds: int) -> None:
    """Time against raw writes on 800 GB of holes; file systems take long to remove them."""
    times: Times = {}
    for number in range(rounds):
        model, other = write_huge(folder / "model"), write_huge(folder / "raw")
        delta = drawn(Checkpoint(model), np.random.default_rng(number))
        sdelta.save(delta, folder / "d.sdelta")
        before = words_at(model, delta)
        timed(times, "raw writes", partial(raw_writes, other, delta, after(delta)))
        timed(times, "merge", partial(merge_in_place, model, folder / "d.sdelta"))
        check(model, delta, before, merged=True)
        timed(times, "raw writes back", partial(raw_writes, other, delta, before))
        timed(times, "revert", partial(revert, model))
        check(model, delta, before, merged=False)
        largest = max(info.numel for info in Checkpoint(model).tensors.values())
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        print(f"{size:,} bytes, {delta.nnz:,} entries, a tensor of {largest:,} elements")
        tell({what: taken[-1:] for what, taken in times.items()})
        shutil.rmtree(model)
        shutil.rmtree(other)
    found = {what: wall for what, (wall, _) in tell(times).items()}
    print(f"merge / raw writes: {found['merge'] / found['raw writes']:.2f}")
    print(f"revert / raw writes back: {found['revert'] / found['raw writes back']:.2f}")
    both = found["raw writes"] + found["raw writes back"]
    print(f"merge and revert / raw writes: {(found['merge'] + found['revert']) / both:.2f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=["sizes", "huge"], default=["sizes", "huge"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        for part in options.parts:
            {"sizes": sizes, "huge": huge}[part](folder, options.rounds)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
