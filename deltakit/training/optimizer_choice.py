"""Which optimizer drives a run: by name, by class, or by a function that makes one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch.optim import Optimizer

from deltakit.errors import ConfigError, nearest
from deltakit.training.any_optimizer import AnyOptimizer, Factory
from deltakit.training.engine import Engine
from deltakit.training.optimizer import SparseAdamW

# For sparse gradients, for closures, for matrices: none of them can drive a vector of entries.
_UNFIT = ("Optimizer", "SparseAdam", "LBFGS", "Muon")


def optimizer_names() -> list[str]:
    """All names: adamw (`SparseAdamW`), adamw8bit, and torch.optim's classes in lower case."""
    return ["adamw", "adamw8bit", *sorted(_torch_classes())]


def make_optimizer(
    engine: Engine,
    optimizer: str | Factory,
    options: Mapping[str, Any] | None,
    *,
    lr: float,
    extras_lr: float,
    weight_decay: float,
    **adamw: Any,
) -> SparseAdamW | AnyOptimizer:
    """The optimizer of a run.

    optimizer: a name, a torch.optim class, or a function (groups, lr=..., **options) -> Optimizer.
    options: go to it. adamw: betas, eps and age, for "adamw" only, unless `options` overrule them.
    Raises ConfigError for unknown names and for what cannot drive entries.
    """
    rates: dict[str, Any] = {"lr": lr, "extras_lr": extras_lr, "weight_decay": weight_decay}
    if optimizer == "adamw":
        unknown = sorted(set(options or {}) - set(adamw))
        if unknown:
            raise ConfigError(
                f"optimizer adamw has no option {unknown[0]!r}; it has betas, eps, age"
            )
        return SparseAdamW(engine, **rates, **{**adamw, **(options or {})})
    factory = _named(optimizer) if isinstance(optimizer, str) else optimizer
    return AnyOptimizer(engine, factory, **rates, options=options)


def _named(name: str) -> Factory:
    if name == "adamw8bit":
        return _bitsandbytes()
    known = _torch_classes()
    if name not in known:
        names = optimizer_names()
        hint = nearest(name, names) or f"; known: {', '.join(names)}"
        raise ConfigError(f"unknown optimizer {name!r}{hint}")
    return known[name]


def _bitsandbytes() -> Factory:
    try:
        factory: Factory = import_module("bitsandbytes.optim").AdamW8bit
    except ImportError:
        raise ConfigError(
            "optimizer adamw8bit needs bitsandbytes, which is not installed; "
            "pip install bitsandbytes"
        ) from None
    return factory


def _torch_classes() -> dict[str, type[Optimizer]]:
    classes = {n: c for n, c in vars(torch.optim).items() if inspect.isclass(c)}
    fit = {n: c for n, c in classes.items() if issubclass(c, Optimizer) and n not in _UNFIT}
    return {n.lower(): c for n, c in fit.items() if c is not torch.optim.AdamW}
