"""The trained entries of a live model: compact values, and writing them through to the weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from deltakit.dtypes import Array
from deltakit.errors import TrainingError
from deltakit.selection.methods import Change
from deltakit.training.resting import Resting


def _no_positions() -> torch.Tensor:
    return torch.zeros(0, dtype=torch.int64)


@dataclass(eq=False)
class Target:
    """One live tensor whose entries may be trained.

    name: in checkpoint coordinates. live_name: of the parameter. indices, slots: int64 [n], in
    order of unmasking; entry `indices[i]` of the tensor is entry `slots[i]` of the compact arrays.
    forbidden: int64, flat indices that must not be chosen.
    """

    number: int
    name: str
    live_name: str
    parameter: torch.nn.Parameter
    indices: torch.Tensor = field(default_factory=_no_positions)
    slots: torch.Tensor = field(default_factory=_no_positions)
    forbidden: torch.Tensor = field(default_factory=_no_positions)
    seed: int | None = None
    resting: Resting | None = None

    @property
    def flat(self) -> torch.Tensor:
        """The live weights as a flat view that shares their memory."""
        return self.parameter.data.view(-1)

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        """Live weights at flat indices, [n]."""
        return self.flat[indices]

    def write(self, indices: torch.Tensor, values: torch.Tensor) -> None:
        """Round values [n] to the live dtype and write them."""
        self.flat.index_copy_(0, indices, values.to(self.parameter))

    def restore(self, indices: torch.Tensor, base: torch.Tensor) -> None:
        """Give weights their base bits [n] back."""
        self.write(indices, base)

    def weights(self) -> torch.Tensor:
        """The live weights, flat, to be read only."""
        return self.flat

    def bounds(self) -> tuple[float, float]:
        """Least and largest |w| of the live weights."""
        least, largest = float("inf"), 0.0
        for part in torch.split(self.weights(), 2**24):
            size = part.abs()
            least, largest = min(least, size.min().item()), max(largest, size.max().item())
        return least, largest

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return tuple(self.parameter.shape)

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return self.parameter.numel()

    def close(self) -> None:
        """Training is over; the live weights stay."""

    def blocked(self) -> Array:
        """Flat indices that are taken or forbidden, int64, sorted."""
        taken, forbidden = self.indices.cpu().numpy(), self.forbidden.cpu().numpy()
        return np.union1d(taken, forbidden)


class Entries:
    """All entries of a run in flat arrays of `budget` places, filled in order of unmasking.

    values: Parameter [budget], float32 (float64 for float64 models): the delta, with its gradient
    accumulated in `values.grad`. base: the base's bits as numbers of the same dtype, [budget].
    order: int32 [budget], the step at which each entry was unmasked. Only the first `count`
    places are in use; the others stay zero.
    """

    def __init__(self, targets: list[Target], budget: int) -> None:
        self.targets = targets
        wide = {t.parameter.dtype == torch.float64 for t in targets}
        if len(wide) != 1:
            raise TrainingError("float64 and narrower tensors cannot be trained in one run")
        device = targets[0].parameter.device
        dtype = torch.float64 if wide.pop() else torch.float32
        self.count = 0
        self._initial_order = np.zeros(0, np.int64)
        self.values = torch.nn.Parameter(torch.zeros(budget, dtype=dtype, device=device))
        self.values.grad = torch.zeros_like(self.values)
        self.base = torch.zeros(budget, dtype=dtype, device=device)
        self.order = torch.zeros(budget, dtype=torch.int32, device=device)
        for target in targets:
            target.indices = target.indices.to(target.parameter.device)
            target.slots = target.slots.to(device)
            target.forbidden = target.forbidden.to(target.parameter.device)

    @property
    def gradient(self) -> torch.Tensor:
        """The accumulated gradient of all places, [budget]."""
        if self.values.grad is None:  # an optimizer's zero_grad(set_to_none=True)
            self.values.grad = torch.zeros_like(self.values)
        return self.values.grad

    @torch.no_grad()
    def add(
        self,
        target: Target,
        indices: torch.Tensor,
        step: int,
        gradient: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> None:
        """Take entries of one tensor into training: flat indices [n], none of them taken yet."""
        slots = torch.arange(self.count, self.count + len(indices), device=self.base.device)
        self._place(target, indices, slots, step, gradient, values)
        self.count += len(indices)

    @torch.no_grad()
    def exchange(self, change: Change, step: int, *, restore: bool) -> torch.Tensor:
        """Let entries leave and others join, in their places first; returns those places, int64.

        restore: entries that leave get their base bits back; if not, they rest where they are, and
        wake up with that value should they ever join again. At least as many join as leave.
        """
        freed = [self._leave(self.targets[n], gone, restore) for n, gone in change.leaving]
        renewed = torch.cat(freed) if freed else _no_positions().to(self.base.device)
        fresh = sum(len(indices) for _, indices, _ in change.joining) - len(renewed)
        assert fresh >= 0, "a support never shrinks"
        unused = torch.arange(self.count, self.count + fresh, device=self.base.device)
        slots, start = torch.cat([renewed, unused]), 0
        for number, indices, gradient in change.joining:
            mine = slots[start : start + len(indices)]
            self._place(self.targets[number], indices, mine, step, gradient, None)
            start += len(indices)
        self.count += fresh
        return renewed

    def _place(
        self,
        target: Target,
        indices: torch.Tensor,
        slots: torch.Tensor,
        step: int,
        gradient: torch.Tensor | None,
        values: torch.Tensor | None,
    ) -> None:
        at = indices.to(target.parameter.device)
        base = target.read(at).to(self.base)
        start = torch.zeros_like(base) if values is None else values.to(self.base)
        if target.resting is not None:
            target.resting.take(at, base, start)
        self.base[slots], self.values[slots], self.order[slots] = base, start, step
        if gradient is not None:
            self.gradient[slots] = gradient.to(self.base)
        target.indices = torch.cat([target.indices, at])
        target.slots = torch.cat([target.slots, slots])

    def _leave(self, target: Target, indices: torch.Tensor, restore: bool) -> torch.Tensor:
        """Take entries out of training; returns the places that are free now."""
        goes = torch.isin(target.indices, indices.to(target.indices))
        gone, slots = target.indices[goes], target.slots[goes]
        if restore:
            target.restore(gone, self.base[slots])
        else:
            kept = (gone, self.base[slots], self.values.detach()[slots], self.order[slots])
            if target.resting is None:
                target.resting = Resting(*kept)
            else:
                target.resting.put(*kept)
        target.indices, target.slots = target.indices[~goes], target.slots[~goes]
        target.seed = None
        self.gradient[slots] = 0
        return slots

    def remember_initial(self, orders: list[Array | None]) -> None:
        """Keep the recorded orders of all entries so far, which an earlier run unmasked.

        An earlier delta without orders counts as unmasked at step 0.
        """
        known = not any(order is None for order in orders)
        parts = [order for order in orders if order is not None] if known else []
        self._initial_order = np.concatenate(parts) if parts else np.zeros(self.count, np.int64)

    def recorded_order(self) -> Array:
        """The order to record per place, int64 [count]: earlier runs first, then this one's steps."""
        order = self.order[: self.count].cpu().numpy().astype(np.int64)
        earlier = len(self._initial_order)
        if earlier:
            order += int(self._initial_order.max()) + 1
            order[:earlier] = self._initial_order
        return order

    def accumulate(self, target: Target, gradient: torch.Tensor) -> None:
        """Add the gradient of a target's entries, taken from its dense gradient (flat)."""
        if len(target.indices):
            taken = gradient.index_select(0, target.indices).to(self.base)
            self.gradient.index_add_(0, target.slots, taken)

    @torch.no_grad()
    def write_through(self) -> None:
        """Set every entry's live weight to round(base + value), the arithmetic of merging.

        The zero is the merge's empty sum: it turns a value of -0.0 into 0.0, as merging does.
        Resting entries have theirs already.
        """
        merged = self.base[: self.count] + (self.values[: self.count] + 0.0)
        for target in self.targets:
            if len(target.indices):
                target.write(target.indices, merged.index_select(0, target.slots))

    @torch.no_grad()
    def write_resting(self) -> None:
        """Set every resting entry's live weight, which `write_through` leaves alone."""
        for target in self.targets:
            if target.resting:
                rest = target.resting
                target.write(rest.indices, rest.base + (rest.values + 0.0))

    @torch.no_grad()
    def restore(self) -> None:
        """Give every entry's live weight its base bits back."""
        for target in self.targets:
            if len(target.indices):
                target.restore(target.indices, self.base.index_select(0, target.slots))
            if target.resting:
                rest = target.resting
                target.restore(rest.indices, rest.base)
