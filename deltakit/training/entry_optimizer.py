"""What every optimizer of an engine's entries and extras does; how they move is its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from torch.optim import Optimizer

from deltakit.training.engine import Engine


class EntryOptimizer(Optimizer):
    """An optimizer of the compact values of entries, and of extras.

    Group 0 holds the entries' values [budget], group 1 the extras' masters, so that learning-rate
    schedulers drive both. Weight decay pulls the values, so the weights go towards the base; it
    does not act on extras.

    `step` first selects and clips (`Engine.finish_gradients`), then updates, then writes through.
    """

    engine: Engine

    @abstractmethod
    def update(self) -> None:
        """Move values and masters by their gradients."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One training step; `closure` recomputes loss and gradients first, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.engine.finish_gradients()
        self.update()
        self.engine.finish_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of entries and extras."""
        self.engine.clear_gradients()


def parameter_groups(
    engine: Engine, lr: float, extras_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Group 0, the entries' values, and, where there are extras, group 1."""
    groups: list[dict[str, Any]] = [
        {"params": [engine.entries.values], "lr": lr, "weight_decay": weight_decay}
    ]
    if engine.extras:
        masters = [extra.master for extra in engine.extras]
        groups.append({"params": masters, "lr": extras_lr, "weight_decay": 0.0})
    return groups


def forget_renewed(optimizer: Optimizer, engine: Engine, values: torch.Tensor) -> None:
    """Start anew where an entry has taken the place of another since this was called last."""
    if len(engine.scoring.renewed):
        reset_state(optimizer, values, engine.scoring.renewed)
        engine.scoring.renewed = engine.scoring.renewed[:0]


def reset_state(optimizer: Optimizer, values: torch.Tensor, slots: torch.Tensor) -> None:
    """Set an optimizer's state of some entries to zero: every tensor shaped like `values`.

    values: the parameter, [n]; slots: int64 [k]. Codes of 8-bit states are set to the one that
    means zero in bitsandbytes' map. What an optimizer does not start from zero (Rprop's step
    sizes, Adagrad's `initial_accumulator_value`) is zero too.
    """
    state = optimizer.state.get(values, {})
    for name, tensor in state.items():
        if torch.is_tensor(tensor) and tensor.shape == values.shape:
            if tensor.dtype == torch.uint8:
                tensor[slots] = state[name.replace("state", "qmap")].abs().argmin().to(tensor)
            else:
                tensor[slots] = 0
