"""Checking the tensors and extras of a delta file one by one, by several threads, against a base
whose weight files may come one by one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import TYPE_CHECKING

from deltakit.delta import SparseDelta
from deltakit.errors import DeltakitError, HubError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta import SdeltaFile
from deltakit.identity import NO_BASE, check_base
from deltakit.shares import Shard, in_order
from deltakit.streaming import all_at_hand, comes_by_file, cut, in_file_order

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What came of a tensor or an extra: one line for each thing that is wrong, and notes."""

    name: str
    is_extra: bool
    entries: int
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check_items(
    file: SdeltaFile,
    base: Checkpoint | None,
    shard: Shard,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> list[Check]:
    """Check a share of the tensors and extras of a file; tensors first, in tensor order.

    Of each the bytes, the rules of the data model and, with `base`, the base are checked; not the
    base of an adapter. progress: called with (entries done, entries in all).
    """
    sizes = {name: record.nbytes for name, record in file.tensors.items()}
    sizes |= {name: record.nbytes for name, record in file.extras.items()}
    sides = [] if base is None else [base]
    files = in_file_order(sizes, *sides)
    rest = set(sizes).difference(*files)
    files += [[name for name in sizes if name in rest]] if rest else []
    own = frozenset(cut(files, sizes, shard.jobs)[shard.number - 1])
    entries = {n: file.tensors[n].nnz if n in file.tensors else 0 for n in own}
    done, found = 0, []
    with _Readers(file, workers) as readers:
        for names in files if base is not None and comes_by_file(base) else [list(sizes)]:
            mine = [name for name in names if name in own]
            at_hand = nullcontext() if base is None else all_at_hand(mine, base)
            with at_hand:
                for check in in_order(lambda name: readers.check(name, base), mine, workers):
                    found.append(check)
                    done += entries[check.name]
                    if progress is not None:
                        progress(done, sum(entries.values()))
    return sorted(found, key=lambda check: (check.is_extra, check.name.encode()))


class _Readers:
    """A file opened once for each thread that reads it, as reading moves the place in it."""

    def __init__(self, file: SdeltaFile, workers: int | None) -> None:
        self._file, self._several = file, (workers or 1) > 1
        self._opened: dict[int, SdeltaFile] = {}
        self._lock, self._stack = Lock(), ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def check(self, name: str, base: Checkpoint | None) -> Check:
        """Read and check a tensor or an extra."""
        file = self._own() if self._several else self._file
        is_extra = name in file.extras
        try:
            if is_extra:
                alone = SparseDelta(tensors={}, extras={name: file.extra(name)})
            else:
                tensors = {name: file.tensor(name)}
                alone = SparseDelta(tensors=tensors, base=file.base, adapter=file.adapter)
            notes = [] if base is None or alone.adapter is not None else check_base(alone, base)
        except HubError:
            raise
        except DeltakitError as error:
            return Check(name=name, is_extra=is_extra, entries=0, problems=(str(error),))
        told = tuple(note for note in notes if note != NO_BASE)
        return Check(name=name, is_extra=is_extra, entries=alone.nnz, notes=told)

    def _own(self) -> SdeltaFile:
        with self._lock:
            if get_ident() not in self._opened:
                opened = self._stack.enter_context(SdeltaFile(self._file.path))
                self._opened[get_ident()] = opened
            return self._opened[get_ident()]
