"""Any optimizer of torch on the compact entries and extras of an engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch.optim import Optimizer

from deltakit.errors import ConfigError
from deltakit.training.engine import Engine

Factory = Callable[..., Optimizer]

# Adafactor scales an update by root mean squares over all of a tensor, so it must not see places
# that hold no entry yet. Every other optimizer of torch.optim treats each number by itself.
_SEES_THE_WHOLE = ("Adafactor",)


class AnyOptimizer(Optimizer):
    """An optimizer made by `factory` over an engine's compact values and extras.

    factory: a torch.optim class or any function (groups, lr=..., **options) -> Optimizer. Group 0
    holds the entries' values [budget], group 1 the extras' masters; both optimizers share groups
    and state, so learning-rate schedulers drive the inner one. Weight decay pulls the values, so
    the weights go towards the base; it does not act on extras. Step counts are shared: an entry
    that joins late is treated as one whose gradients were zero until then (`SparseAdamW` counts
    each entry's own age).

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
        values = engine.entries.values
        groups: list[dict[str, Any]] = [
            {"params": [values], "lr": lr, "weight_decay": weight_decay}
        ]
        if engine.extras:
            masters = [extra.master for extra in engine.extras]
            groups.append({"params": masters, "lr": extras_lr, "weight_decay": 0.0})
        self.inner = _make(factory, groups, lr, dict(options or {}))
        if weight_decay and "weight_decay" not in self.inner.defaults:
            raise ConfigError(f"optimizer {type(self.inner).__name__} has no weight decay")
        self._active = values
        if type(self.inner).__name__ in _SEES_THE_WHOLE:
            self._active = torch.nn.Parameter(values.data[:0])
            self.inner.param_groups[0]["params"] = [self._active]
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self._share()

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
        engine, entries = self.engine, self.engine.entries
        engine.finish_gradients()
        self._look_at_entries()
        forget_renewed(self, engine, self._active)
        masters = [e for e in engine.extras if e.master is not e.parameter]
        for extra in masters:
            extra.master.grad = extra.gradient
        self.inner.step()
        for extra in masters:
            extra.master.grad = None
        entries.values[entries.count :] = 0  # 8-bit states know zero only roughly
        engine.finish_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of entries and extras."""
        self.engine.clear_gradients()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state plus the support, values and progress."""
        forget_renewed(self, self.engine, self._active)
        return {**self.inner.state_dict(), "sparse": self.engine.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state of `state_dict` and write it through to the live model."""
        rest = dict(state_dict)
        self.engine.load_state_dict(rest.pop("sparse"))
        self.engine.renewed = self.engine.renewed[:0]
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


def forget_renewed(optimizer: Optimizer, engine: Engine, values: torch.Tensor) -> None:
    """Start anew where an entry has taken the place of another since this was called last."""
    if len(engine.renewed):
        reset_state(optimizer, values, engine.renewed)
        engine.renewed = engine.renewed[:0]


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
