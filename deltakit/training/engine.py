"""The training engine: from dense gradients, one tensor at a time, to updated entries.

Backward hands each target's dense gradient to a hook, which takes out the gradients of trained
entries, lets the selector score the rest, and frees it before the next one is computed. While the
support is fixed, most layers compute the gradients of entries alone (`training.fixed_support`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from deltakit.errors import TrainingError
from deltakit.gradient_hooks import after_accumulation
from deltakit.parallel.averaging import Averaging, Exchange
from deltakit.parallel.in_order import backward_order
from deltakit.parallel.ranks import Ranks
from deltakit.parallel.sharded_averaging import ShardedAveraging
from deltakit.parallel.shards import Shards
from deltakit.selection.methods import Selector
from deltakit.training.clipping import Clipping
from deltakit.training.entries import Entries
from deltakit.training.entries_state import restore_state, state_of
from deltakit.training.extra import Extra
from deltakit.training.fixed_support import FixedSupport
from deltakit.training.gradient_path import GradientPath
from deltakit.training.scoring import Scoring
from deltakit.training.target import Target


class Engine:
    """Entries, extras, selector and the hooks that feed them.

    model: whose layers compute the gradients of entries alone while the support is fixed; without
    one all come from dense gradients.
    frozen: the entries' values are given and not trained; only extras are.
    buffers: the model's saved buffers by name; forward may change them, the engine never does.
    accumulation_steps: backward passes per optimizer step. Selection needs the gradient summed
    over all of them, so a step that selects keeps dense gradients until the last pass; a step on
    a fixed support frees every one at once.
    ranks: the processes that train together, whose gradients are averaged; exchange: how those of
    a selection are (see `Averaging`). shards: how they share the model's tensors, and with them
    entries and extras.
    """

    def __init__(
        self,
        entries: Entries,
        extras: Sequence[Extra],
        selector: Selector | None,
        *,
        model: torch.nn.Module | None = None,
        frozen: bool = False,
        buffers: Mapping[str, torch.Tensor] | None = None,
        accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        ranks: Ranks | None = None,
        exchange: Exchange = "exact",
        shards: Shards | None = None,
    ) -> None:
        self.entries = entries
        self.buffers = dict(buffers or {})
        self._buffers_before = {name: b.detach().clone() for name, b in self.buffers.items()}
        self.extras = list(extras)
        self.scoring = Scoring(selector, entries, shards.ranks if shards else None)
        self.model = model
        self.frozen = frozen
        self._fixed: FixedSupport | None = None
        self.accumulation_steps = accumulation_steps
        self.clipping = Clipping(max_grad_norm)
        self.step = 0
        self.gradient_norm: float | torch.Tensor | None = None
        self._passes = [0] * len(entries.targets)
        self._finished = False
        for target in entries.targets:
            target.parameter.requires_grad_()  # torch refuses hooks on frozen tensors
        self._hooks = [after_accumulation(t.parameter, self._hook(t)) for t in entries.targets]
        self._sharded = None
        if shards is not None:
            self._sharded = ShardedAveraging(shards, entries, self._offer)
        self.averaging: Averaging | ShardedAveraging | None = self._sharded
        if ranks is not None:
            self.averaging = self._averaging(ranks, exchange)
        self.scoring.choose_ahead(self.step)
        self._freeze_untrained()

    @property
    def selector(self) -> Selector | None:
        """What changes the support; None where nothing does."""
        return self.scoring.selector

    @property
    def paths(self) -> dict[str, GradientPath]:
        """Where the gradients of each tensor's entries come from (see `FixedSupport`)."""
        if self._fixed:
            return dict(self._fixed.paths)
        return {t.name: "dense" for t in self.entries.targets if len(t.indices)}

    @property
    def selecting(self) -> bool:
        """Whether the current step's gradients are scored, to change the support."""
        return self.scoring.scores(self.step)

    @property
    def unmasked(self) -> int:
        """Entries in training so far, of all processes."""
        return self._sharded.total if self._sharded else self.entries.count

    def finish_gradients(self) -> float | torch.Tensor:
        """Take in what backward left, select, clip; returns the norm before clipping.

        The norm is that of chosen entries and extras, the only gradients that move anything; on a
        device it is a tensor [] (see `Clipping`). Idempotent within a step.
        """
        if not self._finished:
            for target in self.entries.targets:
                if target.parameter.grad is not None:
                    self._consume(target)
            if self.averaging:
                if self.selecting:
                    self.averaging.finish_dense()
                self.averaging.average_step()
            if self.selecting:
                self.scoring.choose(self.step)
                if self._sharded:
                    self._sharded.count()
            self.gradient_norm = self._clip()
            self._finished = True
        assert self.gradient_norm is not None
        return self.gradient_norm

    def finish_step(self) -> None:
        """Write entries and extras through, clear gradients and go to the next step."""
        self.entries.write_through()
        for extra in self.extras:
            extra.write_through()
        if self.averaging:
            self.averaging.share_buffers(list(self.buffers.values()))
        was_selecting = self.selecting
        self.step += 1
        self.clear_gradients()
        changed = self.scoring.choose_ahead(self.step)
        if changed or was_selecting != self.selecting:
            self._freeze_untrained()

    def clear_gradients(self) -> None:
        """Forget all gradients of the current step."""
        self.entries.gradient.zero_()
        for target in self.entries.targets:
            target.parameter.grad = None
        for extra in self.extras:
            extra.parameter.grad = None
        self._passes = [0] * len(self._passes)
        self._finished = False
        self.scoring.forget()

    def changed_buffers(self) -> dict[str, torch.Tensor]:
        """The buffers whose values are no longer the base's."""
        before = self._buffers_before
        return {n: b for n, b in self.buffers.items() if not torch.equal(b, before[n])}

    def close(self) -> None:
        """Remove the hooks; the model keeps its trained weights."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._fixed:
            self._fixed.close()
            self._fixed = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, so that it loads with `weights_only=True`."""
        self.clipping.check()
        return {
            **state_of(self.entries),
            "step": self.step,
            "extras": {e.name: (e.master.detach().clone(), e.updates) for e in self.extras},
            "buffers": {name: b.detach().clone() for name, b in self.buffers.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises TrainingError when the state belongs to other targets or extras."""
        if set(state["extras"]) != {e.name for e in self.extras}:
            raise TrainingError("the saved state has other extras than this run")
        restore_state(self.entries, state)
        for extra in self.extras:
            master, extra.updates = state["extras"][extra.name]
            extra.master.copy_(master)
            extra.write_through()
        for name, buffer in self.buffers.items():
            buffer.copy_(state["buffers"][name])
        self.step = int(state["step"])
        self.clear_gradients()
        self._freeze_untrained()

    def _hook(self, target: Target) -> Callable[[torch.Tensor], None]:
        def receive(parameter: torch.Tensor) -> None:
            if parameter.grad is None:  # a compiled model reports even what it did not compute
                return
            self._passes[target.number] += 1
            if self.selecting and self._passes[target.number] < self.accumulation_steps:
                return  # the sum over all passes is scored, so it must be kept
            self._consume(target)

        return receive

    def _consume(self, target: Target) -> None:
        flat = target.take_gradient()
        assert flat is not None
        self.entries.accumulate(target, flat)
        if not self.selecting:
            return
        self.scoring.claim(target, self.accumulation_steps)
        if self.averaging:
            self.averaging.dense(target, flat)
        else:
            self._offer(target, flat)

    def _offer(self, target: Target, flat: torch.Tensor) -> None:
        self.scoring.offer(target, flat, self.step)

    def _averaging(self, ranks: Ranks, exchange: Exchange) -> Averaging:
        return Averaging(
            ranks,
            self.entries,
            self.extras,
            exchange=exchange,
            offer=self._offer,
            magnitude=self.selector.magnitude if self.selector else torch.abs,
            order=backward_order(self.model, self.entries.targets),
        )

    def _clip(self) -> float | torch.Tensor:
        gradients = [self.entries.gradient]
        gradients += [g for e in self.extras if (g := e.held_gradient) is not None]
        total = self._sharded.ranks.add if self._sharded else None
        return self.clipping.clip(gradients, self.step, total)

    def _freeze_untrained(self) -> None:
        """Once the support is fixed, only its entries' gradients are computed.

        Tensors without entries need none at all.
        """
        if self._sharded:
            self._sharded.count()
        for target in self.entries.targets:
            some = self._sharded.trained(target) if self._sharded else len(target.indices) > 0
            target.parameter.requires_grad_(self.selecting or (some and not self.frozen))
        if self.frozen and not self.extras:  # backward needs something to reach
            smallest = min(self.entries.targets, key=lambda target: target.numel)
            smallest.parameter.requires_grad_()
        if self._fixed:
            self._fixed.close()
        settled = not self.selecting and not self.frozen
        self._fixed = None
        if self.model and settled:
            self._fixed = FixedSupport(self.model, self.entries, sharded=self._sharded)
