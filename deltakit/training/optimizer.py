"""AdamW on compact entries, with each entry's own age, and on extras."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log
from typing import Any, Literal

import torch

from deltakit.errors import ConfigError
from deltakit.kernels.dispatch import runs_ahead
from deltakit.training.engine import Engine
from deltakit.training.entry_optimizer import EntryOptimizer, forget_renewed, parameter_groups

Age = Literal["entry", "shared"]


class SparseAdamW(EntryOptimizer):
    """AdamW (Loshchilov and Hutter 2019) on the entries and extras of an engine.

    Bias correction counts per entry from its unmasking (`age="entry"`, as in SpIEL, Ansell et al.
    2024); `age="shared"` counts all steps, as the ID3 toolkit does. Weight decay is decoupled.
    Extras of a 16-bit dtype are trained in float32 and rounded into the model.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        lr: float,
        extras_lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        age: Age = "entry",
    ) -> None:
        if age not in ("entry", "shared"):
            raise ConfigError(f"age must be entry or shared, found {age!r}")
        if lr < 0 or extras_lr < 0 or weight_decay < 0:
            raise ConfigError("learning rates and weight decay must not be negative")
        self.engine = engine
        groups = parameter_groups(engine, lr, extras_lr, weight_decay)
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "age": age})

    def update(self) -> None:
        """Adam on the entries in training and on the extras that got a gradient."""
        engine, entries = self.engine, self.engine.entries
        state = self._moments(entries.values)
        forget_renewed(self, engine, entries.values)
        active = slice(0, entries.count)
        group = self.param_groups[0]
        ages: torch.Tensor | int = engine.step + 1
        if group["age"] == "entry":
            ages = ages - entries.order[active].long()
        _adamw(entries.values, entries.gradient, state, ages, group, active)
        for extra in engine.extras:
            if extra.gradient is not None:
                state = self._moments(extra.master)
                extra.updates += 1
                group = self.param_groups[1]
                _adamw(extra.master, extra.gradient, state, extra.updates, group, slice(None))

    def state_dict(self) -> dict[str, Any]:
        """Torch's state plus the support, values and progress: all that resuming needs."""
        forget_renewed(self, self.engine, self.engine.entries.values)
        return {**super().state_dict(), "sparse": self.engine.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state of `state_dict` and write it through to the live model."""
        rest = dict(state_dict)
        self.engine.load_state_dict(rest.pop("sparse"))
        self.engine.scoring.renewed = self.engine.scoring.renewed[:0]
        super().load_state_dict(rest)

    def _moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        if state["exp_avg"].shape != parameter.shape:  # `Entries.reserve` has made places since
            for name, moment in state.items():
                state[name] = torch.zeros_like(parameter)
                shared = min(len(moment), len(parameter))  # beyond them no entry is in use
                state[name][:shared] = moment[:shared]
        return state


def _adamw(
    values: torch.Tensor,
    gradient: torch.Tensor,
    state: dict[str, torch.Tensor],
    age: torch.Tensor | int,
    group: dict[str, Any],
    active: slice,
) -> None:
    """Kingma and Ba 2015, algorithm 1, with `age` in place of t: one count, or int64 [n]."""
    beta1, beta2 = group["betas"]
    value, grad = values.data[active], gradient[active]
    mean, square = state["exp_avg"][active], state["exp_avg_sq"][active]
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    bias1, bias2 = _bias(beta1, age, value), _bias(beta2, age, value)
    if group["weight_decay"]:
        value.mul_(1 - group["lr"] * group["weight_decay"])
    scale = (square / bias2).sqrt_().add_(group["eps"])
    value.sub_((mean / bias1).div_(scale).mul_(group["lr"]))


def _bias(beta: float, age: torch.Tensor | int, like: torch.Tensor) -> torch.Tensor | float:
    if isinstance(age, int):
        return float(1 - beta**age)
    if runs_ahead(age):  # a table would make the host wait for the ages, and copy it to the device
        exponent = age.to(like.dtype).mul_(log(beta) if beta else -inf)
        return torch.expm1(exponent).neg_()
    shortest, longest = (int(age.min()), int(age.max())) if len(age) else (0, 0)
    if shortest == longest:  # one number for all, rounded as in the table
        return torch.tensor([1 - beta**longest], dtype=like.dtype, device=like.device)
    table: Sequence[float] = [1 - beta**n for n in range(longest + 1)]
    return torch.tensor(table, dtype=like.dtype, device=like.device)[age]
