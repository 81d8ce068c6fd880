"""The trained entries of a live model: compact values, and writing them through to the weights."""

from __future__ import annotations

import numpy as np
import torch

from deltakit.dtypes import Array
from deltakit.errors import TrainingError
from deltakit.kernels.dispatch import by_triton
from deltakit.selection.methods import Change
from deltakit.training.resting import Resting
from deltakit.training.target import Target

# What the kernel rounds to; float64 tensors have float64 values.
_ROUNDED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Entries:
    """All entries of a run in flat arrays of places, filled in order of unmasking.

    values: Parameter [places], float32 (float64 for float64 models): the delta, with its gradient
    accumulated in `values.grad`. base: the base's bits as numbers of the same dtype, [places].
    order: int32 [places], the step at which each entry was unmasked. Only the first `count`
    places are in use; the others stay zero.
    places: `budget` by default. Where processes share the budget, each begins with fewer and
    `reserve` makes room.
    """

    def __init__(self, targets: list[Target], budget: int, places: int | None = None) -> None:
        self.targets, self.budget = targets, budget
        wide = {t.parameter.dtype == torch.float64 for t in targets}
        if len(wide) != 1:
            raise TrainingError("float64 and narrower tensors cannot be trained in one run")
        device = targets[0].parameter.device
        dtype = torch.float64 if wide.pop() else torch.float32
        self.count = 0
        self._initial_order, self._initial_steps = np.zeros(0, np.int64), 0
        places = budget if places is None else places
        self.values = torch.nn.Parameter(torch.zeros(places, dtype=dtype, device=device))
        self.values.grad = torch.zeros_like(self.values)
        self.base = torch.zeros(places, dtype=dtype, device=device)
        self.order = torch.zeros(places, dtype=torch.int32, device=device)
        for target in targets:
            target.indices = target.indices.to(target.parameter.device)
            target.slots = target.slots.to(device)
            target.forbidden = target.forbidden.to(target.parameter.device)

    @property
    def gradient(self) -> torch.Tensor:
        """The accumulated gradient of all places, [places]."""
        if self.values.grad is None:  # an optimizer's zero_grad(set_to_none=True)
            self.values.grad = torch.zeros_like(self.values)
        return self.values.grad

    @torch.no_grad()
    def reserve(self, needed: int) -> None:
        """Make room for so many entries, and some to spare so that it is not made too often."""
        missing = needed - len(self.base)
        if missing <= 0:
            return
        more = max(missing, min(len(self.base) // 8, self.budget - len(self.base)))
        gradient = torch.cat([self.gradient, self.gradient.new_zeros(more)])
        self.values.grad = None
        self.values.data = torch.cat([self.values.data, self.base.new_zeros(more)])
        self.values.grad = gradient
        self.base = torch.cat([self.base, self.base.new_zeros(more)])
        self.order = torch.cat([self.order, self.order.new_zeros(more)])

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
        self.reserve(self.count + len(indices))
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
        none = torch.zeros(0, dtype=torch.int64, device=self.base.device)
        renewed = torch.cat([none, *freed])
        fresh = sum(len(indices) for _, indices, _ in change.joining) - len(renewed)
        assert fresh >= 0, "a support never shrinks"
        self.reserve(self.count + fresh)
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

    def remember_initial(self, orders: list[Array], steps: int) -> None:
        """Keep the recorded orders of all entries so far, which an earlier run of `steps` unmasked."""
        self._initial_order = np.concatenate([np.zeros(0, np.int64), *orders])
        self._initial_steps = steps

    def recorded_order(self) -> Array:
        """The order to record per place, int64 [count]: earlier runs first, then this one's steps."""
        order = self.order[: self.count].cpu().numpy().astype(np.int64)
        order += self._initial_steps
        order[: len(self._initial_order)] = self._initial_order
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
        trained = [target for target in self.targets if len(target.indices)]
        rest = [target for target in trained if not self._by_kernel(target)]
        if rest:
            merged = self.base[: self.count] + (self.values[: self.count] + 0.0)
        for target in rest:
            target.write(target.indices, merged.index_select(0, target.slots))

    def _by_kernel(self, target: Target) -> bool:
        """Write one tensor's entries through by a kernel, where there is one; whether it was."""
        if not by_triton(self.base) or type(target).write is not Target.write:
            return False
        if target.flat.device != self.base.device or target.flat.dtype not in _ROUNDED:
            return False
        from deltakit.kernels.write_through import write_through

        write_through(target.flat, target.indices, target.slots, self.base, self.values.data)
        return True

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
