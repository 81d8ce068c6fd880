"""What the processes of a data-parallel run exchange in a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Literal

import torch

from deltakit.errors import ConfigError
from deltakit.parallel.candidates import SHARE, average_candidates
from deltakit.parallel.in_order import InOrder
from deltakit.parallel.ranks import Ranks, flattened
from deltakit.training.entries import Entries
from deltakit.training.extra import Extra
from deltakit.training.target import Target

Exchange = Literal["exact", "candidates"]
Offer = Callable[[Target, torch.Tensor], None]
Magnitude = Callable[[torch.Tensor], torch.Tensor]


class Averaging:
    """Averages gradients over ranks: those of entries and extras always, dense ones to select.

    A step on a fixed support exchanges one flat tensor: the gradients of entries and extras. A
    step that selects also exchanges dense gradients, tensor by tensor as backward hands them
    over: "exact" averages all of each, so that ranks score what one process would have; with
    "candidates" each rank names the entries it would rank first, `SHARE` of each tensor, and
    only those are averaged and scored.

    offer: takes a target and its averaged dense gradient, flat. magnitude: what candidates are
    ranked by, from a gradient [R, C], flat. order: numbers of targets as backward is expected to
    reach them.
    """

    def __init__(
        self,
        ranks: Ranks,
        entries: Entries,
        extras: Sequence[Extra],
        *,
        exchange: Exchange,
        offer: Offer,
        magnitude: Magnitude,
        order: Sequence[int],
    ) -> None:
        if exchange not in ("exact", "candidates"):
            raise ConfigError(f"exchange must be exact or candidates, found {exchange!r}")
        self.ranks = ranks
        self.wants_stop = False  # set by this rank, whenever it likes
        self._told: torch.Tensor | None = None  # what ranks told in the last step's exchange
        self._entries, self._extras = entries, list(extras)
        self._offer, self._magnitude = offer, magnitude
        self._exact = exchange == "exact"
        density = entries.budget / sum(target.numel for target in entries.targets)
        self._share = max(SHARE, 2 * density)
        self._turns = InOrder(ranks, order, self._take, self._zeros, entries.base.device)

    def dense(self, target: Target, gradient: torch.Tensor) -> None:
        """A dense gradient [numel] of a selection step; it is offered when it is its turn."""
        self._turns.ready(target.number, gradient)

    def finish_dense(self) -> None:
        """Backward is over on this rank: exchange and offer what has not been yet."""
        self._turns.finish()

    def average_step(self) -> None:
        """Average the gradients of entries and extras by one collective.

        An extra that has a gradient on no rank is left without one.
        """
        entries, extras = self._entries, self._extras
        gradients = [e.parameter.grad for e in extras]
        parts = [entries.gradient[: entries.count]]
        parts += [
            torch.zeros_like(e.parameter) if g is None else g
            for e, g in zip(extras, gradients, strict=True)
        ]
        mine = [*(g is not None for g in gradients), self.wants_stop]
        flags = [entries.base.new_full((1,), flag) for flag in mine]  # filled where they are
        flat = flattened([*parts, *flags], entries.base.dtype)
        self.ranks.average(flat)
        *averaged, told = torch.split(flat, [*(part.numel() for part in parts), len(flags)])
        entries.gradient[: entries.count] = averaged[0]
        self._told = told > 0
        # A gradient of this rank's own is reason enough; only for others a device is waited for.
        present = mine[:-1] if all(mine[:-1]) else self._told[:-1].tolist()
        for extra, mean, here in zip(extras, averaged[1:], present, strict=True):
            if here:
                extra.parameter.grad = mean.view_as(extra.parameter).to(extra.parameter)

    @property
    def stopping(self) -> bool:
        """Whether some rank wanted to stop when the last step was averaged; waits for it."""
        return self._told is not None and bool(self._told[-1])

    def share_buffers(self, buffers: Sequence[torch.Tensor]) -> None:
        """Give every rank rank 0's buffers, as DistributedDataParallel does."""
        for buffer in buffers:
            self.ranks.from_first(buffer)

    def _take(self, number: int, gradient: torch.Tensor) -> None:
        target = self._entries.targets[number]
        if self._exact:
            self.ranks.average(gradient)
        else:
            count = ceil(self._share * target.numel)
            rows = target.shape[0] if len(target.shape) > 1 else 1
            magnitude = self._magnitude(gradient.view(rows, -1))
            average_candidates(self.ranks, gradient, magnitude, count)
        self._offer(target, gradient)

    def _zeros(self, number: int) -> torch.Tensor:
        parameter = self._entries.targets[number].parameter
        return torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
