"""Dense gradients given out in one order on all ranks, whatever order backward takes on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from deltakit.parallel.ranks import Ranks
from deltakit.training.target import Target


def backward_order(model: torch.nn.Module | None, targets: Sequence[Target]) -> list[int]:
    """The order in which backward is expected to reach targets: against that of the model."""
    numbers = {id(target.parameter): target.number for target in targets}
    parameters = [] if model is None else list(model.parameters())
    forward = [numbers.pop(id(p)) for p in parameters if id(p) in numbers]
    return [*forward, *numbers.values()][::-1]


class InOrder:
    """Lets each tensor's gradient go on when it is its turn.

    Ranks must exchange tensors in one order, but backward may finish them in another order on
    each, or not reach some at all (an expert that no token of this rank chose). So a gradient
    waits until all before it are through, and `finish` supplies zeros for what never came. The
    order is `order` in the first step and from then on what rank 0's backward took in that step;
    where backward follows it, no gradient waits and one at a time is held.

    take: (number, gradient) whose turn it is. missing: number -> a gradient of zeros. device: where
    the ranks' collectives work.
    """

    def __init__(
        self,
        ranks: Ranks,
        order: Sequence[int],
        take: Callable[[int, torch.Tensor], None],
        missing: Callable[[int], torch.Tensor],
        device: torch.device,
    ) -> None:
        self._ranks, self._take, self._missing, self._device = ranks, take, missing, device
        self._order = list(order)
        self._seen: list[int] | None = []  # None once the order is settled
        self._waiting: dict[int, torch.Tensor] = {}
        self._next = 0

    def ready(self, number: int, gradient: torch.Tensor) -> None:
        """Backward has finished a gradient."""
        if self._seen is not None:
            self._seen.append(number)
        self._waiting[number] = gradient
        while self._next < len(self._order) and self._order[self._next] in self._waiting:
            self._advance()

    def finish(self) -> None:
        """Backward is over: let all go that have not gone yet."""
        while self._next < len(self._order):
            number = self._order[self._next]
            if number not in self._waiting:
                self._waiting[number] = self._missing(number)
            self._advance()
        self._next = 0
        if self._seen is not None:
            self._settle(self._seen)
            self._seen = None

    def _advance(self) -> None:
        number = self._order[self._next]
        self._next += 1
        self._take(number, self._waiting.pop(number))

    def _settle(self, seen: list[int]) -> None:
        seen += [number for number in self._order if number not in set(seen)]
        order = torch.tensor(seen, dtype=torch.int64, device=self._device)
        self._ranks.from_first(order)
        self._order = order.tolist()
