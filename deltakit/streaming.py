"""Checkpoints read weight file by weight file, local or on the Hub, and the shares of jobs in them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from deltakit.formats.checkpoint import Checkpoint
from deltakit.hub.listing import listed
from deltakit.hub.location import Location, is_location
from deltakit.merging.hub_base import HubBase
from deltakit.shares import Shard, runs


def streamed(given: str | os.PathLike[str] | Checkpoint, *, keep: bool = True) -> Checkpoint:
    """A checkpoint whose weight files, if it is on the Hub, come one by one (`at_hand`).

    keep: whether those that are downloaded stay in the cache.
    """
    if isinstance(given, Checkpoint):
        return given
    if is_location(given):
        return HubBase(listed(Location.parse(given)), keep=keep)
    return Checkpoint(os.fspath(given))


def comes_by_file(checkpoint: Checkpoint) -> bool:
    """Whether some of its weight files are still on the Hub only."""
    return isinstance(checkpoint, HubBase) and not checkpoint.is_whole


def by_file(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Weight file -> the tensors that are read of it, both in the order in which they stand."""
    return {
        file: [name for name, info in shard.tensors.items() if checkpoint.tensors.get(name) == info]
        for file, shard in checkpoint.shards.items()
    }


def in_file_order(names: Iterable[str], *checkpoints: Checkpoint) -> list[list[str]]:
    """Tensors by the weight file of the first of `checkpoints` that has them, in the order in which
    they stand there; files without any are left out."""
    rest = set(names)
    found = []
    for checkpoint in checkpoints:
        for held in by_file(checkpoint).values():
            found.append([name for name in held if name in rest])
            rest.difference_update(held)
    return [held for held in found if held]


def cut(files: Sequence[Sequence[str]], size: dict[str, int], jobs: int) -> list[list[str]]:
    """The tensors of each of `jobs` jobs: whole files where there are as many, so that a file is
    read by one job; single tensors otherwise."""
    if len(files) >= jobs:
        shares = runs(files, lambda held: sum(size[name] for name in held), jobs)
        return [[name for held in share for name in held] for share in shares]
    return runs([name for held in files for name in held], size.__getitem__, jobs)


def share_of(shard: Shard, files: Sequence[Sequence[str]], size: dict[str, int]) -> frozenset[str]:
    """The tensors of one job; see `cut`."""
    return frozenset(cut(files, size, shard.jobs)[shard.number - 1])


@contextmanager
def all_at_hand(names: Iterable[str], *checkpoints: Checkpoint) -> Iterator[None]:
    """Have the weight files that hold any of these tensors ready to be read."""
    wanted = set(names)
    with ExitStack() as stack:
        for checkpoint in checkpoints:
            for file, held in by_file(checkpoint).items():
                if not wanted.isdisjoint(held):
                    stack.enter_context(checkpoint.at_hand(file))
        yield
