"""What the processes of a sharded run exchange in a step, beyond what FSDP itself does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from deltakit.parallel.averaging import Offer
from deltakit.parallel.ranks import flattened
from deltakit.parallel.shards import Shards
from deltakit.training.entries import Entries
from deltakit.training.target import Target

Taking = Callable[[torch.Tensor], None]


class ShardedAveraging:
    """Gradients of entries that every process computes for all, and each keeps its own of.

    FSDP has averaged dense gradients when they arrive, of the rows held here. On a fixed support
    layers compute the gradients of entries alone, on every process those of all processes'
    entries (of its own rows of the batch), and these are averaged here, by one collective a step.
    So each process knows the whole support's places, and has values and optimizer state of its own
    entries only.

    offer: takes a target and its dense gradient of the rows held here, flat.
    """

    def __init__(self, shards: Shards, entries: Entries, offer: Offer) -> None:
        self.ranks = shards.ranks
        self.wants_stop = False  # set by this rank, whenever it likes
        self._told: torch.Tensor | None = None  # what ranks told in the last step's exchange
        self._shards, self._entries, self._offer = shards, entries, offer
        self._counts: list[list[int]] = []
        self._pending: dict[int, torch.Tensor] = {}  # tensor -> gradient of all entries [nnz]
        self._places: dict[int, tuple[int, torch.Tensor]] = {}  # -> of mine: the first, the slots

    def count(self) -> None:
        """Take note of how many entries each process has in each tensor."""
        entries = self._entries
        own = [len(target.indices) for target in entries.targets]
        counts = torch.tensor(own, device=entries.base.device)
        self._counts = torch.stack(self.ranks.gathered(counts)).T.tolist()
        self._pending, self._places = {}, {}

    @property
    def total(self) -> int:
        """Entries of all processes, when they were counted last."""
        return sum(map(sum, self._counts))

    def trained(self, target: Target) -> bool:
        """Whether any process trains entries of a tensor."""
        return sum(self._counts[target.number]) > 0

    def everywhere(self, target: Target) -> Target:
        """A tensor with the entries of all processes, in order of index."""
        indices = target.indices.sort().values + target.start
        (joined,) = self._shards.joined([indices])
        return replace(target, indices=joined, start=0)

    def taking(self, target: Target) -> Taking:
        """What takes in the gradient of all processes' entries of a tensor, in order of index."""
        number, counts = target.number, self._counts[target.number]
        mine = self._entries.targets[number]
        slots = mine.slots[mine.indices.argsort()]
        self._places[number] = sum(counts[: self.ranks.rank]), slots
        self._pending[number] = self._entries.base.new_zeros(sum(counts))

        def take(gradient: torch.Tensor) -> None:
            self._pending[number] += gradient

        return take

    def dense(self, target: Target, gradient: torch.Tensor) -> None:
        """A dense gradient of a selection step, averaged by FSDP: it is offered at once."""
        self._offer(target, gradient)

    def finish_dense(self) -> None:
        """Backward is over; nothing waits."""

    def average_step(self) -> None:
        """Average the gradients of entries, and see whether some process wants to stop."""
        entries = self._entries
        numbers = sorted(self._pending)
        parts = [self._pending[number] for number in numbers]
        flag = entries.base.new_full((1,), self.wants_stop)  # filled where it is
        flat = flattened([*parts, flag], entries.base.dtype)
        self.ranks.average(flat)
        *averaged, told = torch.split(flat, [*(len(part) for part in parts), 1])
        for number, mean in zip(numbers, averaged, strict=True):
            start, slots = self._places[number]
            entries.gradient.index_add_(0, slots, mean[start : start + len(slots)])
            self._pending[number].zero_()
        self._told = told > 0

    @property
    def stopping(self) -> bool:
        """Whether some rank wanted to stop when the last step was averaged; waits for it."""
        return self._told is not None and bool(self._told)

    def share_buffers(self, buffers: Sequence[torch.Tensor]) -> None:
        """Give every rank rank 0's buffers, as in data-parallel training."""
        for buffer in buffers:
            self.ranks.from_first(buffer)
