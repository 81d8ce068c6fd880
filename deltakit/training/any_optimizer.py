"""Any optimizer of torch on the compact entries and extras of an engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from deltakit.errors import ConfigError
from deltakit.training.engine import Engine
from deltakit.training.entry_optimizer import EntryOptimizer, forget_renewed, parameter_groups

Factory = Callable[..., Optimizer]

# Adafactor scales an update by root mean squares over all of a tensor, so it must not see places
# that hold no entry yet. Every other optimizer of torch.optim treats each number by itself.
_SEES_THE_WHOLE = ("Adafactor",)


class AnyOptimizer(EntryOptimizer):
    """An optimizer made by `factory` over an engine's compact values and extras.

    factory: a torch.optim class or any function (groups, lr=..., **options) -> Optimizer. Both
    optimizers share groups and state, so learning-rate schedulers drive the inner one. Step counts
    are shared: an entry that joins late is treated as one whose gradients were zero until then
    (`SparseAdamW` counts each entry's own age).

    Adafactor's root mean squares run over entries in training only. Its step is relative to the
    size of the values, which start from zero: raise its `eps[1]` (1.0 makes `lr` absolute).

    Raises ConfigError for an optimizer that cannot drive entries or does not take the options.
    """

    def __init__(
        self,
        engine: Engine,
        factory: Factory,
        *,
        lr: float,
        extras_lr: float,
        weight_decay: float = 0.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine = engine
        engine.entries.reserve(engine.entries.budget)  # its state does not grow
        groups = parameter_groups(engine, lr, extras_lr, weight_decay)
        self.inner = _make(factory, groups, lr, dict(options or {}))
        if weight_decay and "weight_decay" not in self.inner.defaults:
            raise ConfigError(f"optimizer {type(self.inner).__name__} has no weight decay")
        self._active = engine.entries.values
        if type(self.inner).__name__ in _SEES_THE_WHOLE:
            self._active = torch.nn.Parameter(self._active.data[:0])
            self.inner.param_groups[0]["params"] = [self._active]
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self._share()

    def update(self) -> None:
        """A step of the inner optimizer on what is in training."""
        engine, entries = self.engine, self.engine.entries
        self._look_at_entries()
        forget_renewed(self, engine, self._active)
        masters = [e for e in engine.extras if e.master is not e.parameter]
        for extra in masters:
            extra.master.grad = extra.gradient
        self.inner.step()
        for extra in masters:
            extra.master.grad = None
        entries.values[entries.count :] = 0  # 8-bit states know zero only roughly

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state plus the support, values and progress."""
        forget_renewed(self, self.engine, self._active)
        return {**self.inner.state_dict(), "sparse": self.engine.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state of `state_dict` and write it through to the live model."""
        rest = dict(state_dict)
        self.engine.load_state_dict(rest.pop("sparse"))
        self.engine.scoring.renewed = self.engine.scoring.renewed[:0]
        self.inner.state.clear()
        self._look_at_entries()
        self.inner.load_state_dict(rest)
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def _look_at_entries(self) -> None:
        """Let a view over the places in use follow their number, and its state with it."""
        entries = self.engine.entries
        if self._active is entries.values:
            return
        before, count = self._active.numel(), entries.count
        self._active.grad = None
        self._active.data = entries.values.data[:count]
        if count:
            self._active.grad = entries.gradient[:count]
        for name, tensor in self.inner.state.get(self._active, {}).items():
            if torch.is_tensor(tensor) and tensor.shape == (before,):
                grown = torch.cat([tensor, tensor.new_zeros(count - before)])
                self.inner.state[self._active][name] = grown


def _make(
    factory: Factory, groups: list[dict[str, Any]], lr: float, options: dict[str, Any]
) -> Optimizer:
    name = getattr(factory, "__name__", "optimizer")
    taken = [option for option in ("lr", "weight_decay") if option in options]
    if taken:
        raise ConfigError(f"optimizer_options: {taken[0]} has an argument of its own; use that")
    try:
        optimizer = factory(groups, lr=lr, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer {name} cannot be made: {error}") from None
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(f"optimizer {name} evaluates the loss more than once per step")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ConfigError("optimizer SparseAdam wants sparse tensors; compact values are dense")
    return optimizer
