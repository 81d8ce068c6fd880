"""Writing what a merge makes: one file, or a folder file by file, by several workers."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Lock

from deltakit.budget import format_bytes
from deltakit.errors import OutputError
from deltakit.formats import rewrite
from deltakit.formats.atomic import placing, replacing
from deltakit.formats.partial_folder import is_whole, resuming_folder
from deltakit.merging.base_values import check_arrived
from deltakit.merging.carry import Carried, copy_carried
from deltakit.merging.files import WeightFile
from deltakit.merging.naming import Output
from deltakit.merging.plan import Plan

Progress = Callable[[int, int], None]
WORKERS = 4  # by default at most; more do not make a disk faster


@dataclass(frozen=True, slots=True)
class Writing:
    """All that is to be written to one output. small: config.json and the index, if made here."""

    weights: Sequence[WeightFile]
    carried: Sequence[Carried]
    small: dict[str, bytes]

    @property
    def sizes(self) -> dict[str, int]:
        """Name -> size in bytes of every file."""
        sizes = {file.name: file.size for file in self.weights}
        sizes |= {file.name: file.size for file in self.carried}
        return sizes | {name: len(data) for name, data in self.small.items()}


def check_space(path: Path, size: int) -> None:
    """Raise OutputError where there is no room for `size` bytes beside `path`."""
    parent = path.absolute().parent
    free = shutil.disk_usage(parent).free
    if size > free:
        raise OutputError(
            f"{path} needs {format_bytes(size)}, {parent} has {format_bytes(free)} free"
        )


def write_output(
    writing: Writing, plan: Plan, output: Output, progress: Progress | None, workers: int | None
) -> None:
    """Write it all, but for weight files that an earlier, killed merge has finished; a note in `plan`
    counts them.

    progress: called with (bytes done, bytes in all). workers: threads, one weight file each; by
    default as many as there are processors and files, at most 4.
    """
    size = sum(writing.sizes.values())
    if not output.is_folder:
        (file,) = writing.weights
        with replacing(output.path) as temporary:
            check_space(output.path, size)
            rewrite.write(temporary, file.header, file.parts, _Advance(file.size, progress))
        return
    with resuming_folder(output.path, merge_key(plan, writing)) as folder:
        finished = [f for f in writing.weights if is_whole(folder / f.name, f.size)]
        check_space(output.path, size - sum(file.size for file in finished))
        write_small(writing, folder)
        write_weights(writing.weights, finished, plan, folder, progress, workers)
    if finished:
        plan.notes.append(f"{len(finished)} weight files were finished by an earlier merge")


def write_small(writing: Writing, folder: Path) -> None:
    """Write all but the weights."""
    copy_carried(writing.carried, folder)
    for name, data in writing.small.items():
        with placing(folder / name) as temporary:
            temporary.write_bytes(data)


def write_weights(
    files: Sequence[WeightFile],
    finished: Sequence[WeightFile],
    plan: Plan,
    folder: Path,
    progress: Progress | None,
    workers: int | None,
) -> None:
    """Write those of the weight files that are not `finished`; see `write_output`."""
    advance = _Advance(sum(file.size for file in files), progress)
    for file in finished:
        advance(file.size)
    count = workers or min(WORKERS, os.cpu_count() or 1)
    rest = [file for file in files if file not in finished]
    _all([partial(_write_file, folder, file, plan, advance) for file in rest], count, advance)


def merge_key(plan: Plan, writing: Writing) -> str:
    """A digest of all that the bytes of the output depend on, 16 hexadecimal digits.

    The base counts by its version, so that it need not be read.
    """
    found = hashlib.sha256(repr((plan.dtype, plan.untouched, plan.requantizer is None)).encode())
    found.update(plan.base.version().encode())
    for weights in writing.weights:
        found.update(weights.name.encode() + b"\0" + weights.header)
    for each in plan.inputs:
        found.update(f"{each.digest()} {each.weight}".encode())
    for name, array in plan.extras.items():  # of the head that was chosen
        found.update(name.encode() + b"\0" + array.tobytes())
    for data in writing.small.values():
        found.update(data)
    return found.hexdigest()[:16]


def _write_file(folder: Path, file: WeightFile, plan: Plan, advance: _Advance) -> None:
    with plan.base.at_hand(file.name):
        check_arrived(plan, file.name)
        with placing(folder / file.name) as temporary:
            rewrite.write(temporary, file.header, file.parts, advance)


def _all(jobs: Sequence[Callable[[], None]], workers: int, advance: _Advance) -> None:
    """Run the jobs; the first error of one stops the others."""
    if min(workers, len(jobs)) <= 1:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()
        finally:
            advance.stopped.set()
            pool.shutdown(cancel_futures=True)


class _Advance:
    """Counts bytes written by all workers, tells the user, and ends workers that should stop."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.stopped = Event()
        self._total, self._done, self._progress, self._lock = total, 0, progress, Lock()

    def __call__(self, size: int) -> None:
        if self.stopped.is_set():
            raise InterruptedError("another worker failed")
        with self._lock:
            self._done += size
            if self._progress is not None:
                self._progress(self._done, self._total)
