"""Shares of work for the jobs of a job array, and work in order by several threads.

A share is a run of neighbouring items, such as weight files or tensors, so that a job reads and
downloads few files. Which items those are depends on their sizes and the number of jobs alone.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeVar

from deltakit.errors import ConfigError

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Shard:
    """Job `number` of `jobs`, counted from 1, as `3/8` on the command line."""

    number: int
    jobs: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.jobs:
            raise ConfigError(f"shard {self} is none: the first of 8 jobs is 1/8 and the last 8/8")

    def __str__(self) -> str:
        return f"{self.number}/{self.jobs}"

    @classmethod
    def parse(cls, given: Shard | str | tuple[int, int]) -> Shard:
        """A shard as users give it: `(3, 8)` or "3/8". Raises ConfigError for any other."""
        if isinstance(given, Shard):
            return given
        text = given if isinstance(given, str) else "/".join(str(number) for number in given)
        if not re.fullmatch(r"\d{1,9}/\d{1,9}", text, re.ASCII):
            raise ConfigError(f"shard {text!r} is not I/N, such as 3/8 for the third of 8 jobs")
        number, jobs = text.split("/")
        return cls(int(number), int(jobs))

    def of(self, items: Sequence[Item], size: Callable[[Item], int]) -> list[Item]:
        """Its share of the items, of the sizes that `size` tells; see `runs`."""
        return runs(items, size, self.jobs)[self.number - 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareReport:
    """What one job of a job array did and what is missing.

    shard: "3/8". files: how many all jobs have to write. written: names of those that this job
    wrote. found: those of its share that were finished before. missing: those of other jobs that
    are still to come. published: whether this job, as the last one at work, put the whole output in
    its place. As text it is a line for the user.
    """

    shard: str
    files: int
    written: tuple[str, ...]
    found: tuple[str, ...]
    missing: tuple[str, ...]
    published: bool

    def __str__(self) -> str:
        told = f"shard {self.shard}: written {len(self.written)} of {self.files} files"
        if self.found:
            told += f", {len(self.found)} finished before"
        if self.missing:
            return f"{told}; {len(self.missing)} still to come from other shards"
        return f"{told}; complete"

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def runs(items: Sequence[Item], size: Callable[[Item], int], jobs: int) -> list[list[Item]]:
    """The items cut into `jobs` runs, in order; none is empty where there are as many items.

    An item goes to the job in whose part of the whole its middle lies. So no run is larger than
    an equal part and the largest item together.
    """
    sizes = [max(1, size(item)) for item in items]
    ends = list(accumulate(sizes))
    cuts = [0]
    for job in range(1, jobs):
        cut = cuts[-1]
        while cut < len(items) and (2 * ends[cut] - sizes[cut]) * jobs < 2 * ends[-1] * job:
            cut += 1
        if len(items) >= jobs:
            cut = min(max(cut, cuts[-1] + 1), len(items) - (jobs - job))
        cuts.append(max(cut, cuts[-1]))
    cuts.append(len(items))
    return [list(items[start:stop]) for start, stop in pairwise(cuts)]


def in_order(
    make: Callable[[Item], Made], items: Iterable[Item], workers: int | None
) -> Iterator[Made]:
    """What `make` gives for each item, in order, made by several threads.

    workers: threads; one makes all in this thread. No more than `workers` results are made and
    waiting at a time, so that memory does not grow with the number of items. The first error ends
    the work: what has not begun is not.
    """
    if (workers or 1) <= 1:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Made]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) == workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
