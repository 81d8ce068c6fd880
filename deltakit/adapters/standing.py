"""Which adapters stand in a model now, and which of its parameters were trainable before them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from deltakit.adapters.kinds import KINDS
from deltakit.errors import ConfigError


@dataclass(frozen=True, eq=False)
class _Standing:
    kind: str
    modules: Sequence[str]


@dataclass(eq=False)
class _Model:
    trainable: list[tuple[torch.nn.Parameter, bool]]
    adapters: list[_Standing] = field(default_factory=list)


_MODELS: weakref.WeakKeyDictionary[torch.nn.Module, _Model] = weakref.WeakKeyDictionary()


def enter(model: torch.nn.Module, kind: str, modules: Sequence[str]) -> Callable[[], None]:
    """Note that an adapter comes to stand at modules, by plain live names.

    Returns what to call once it is out again: without adapters, the parameters that required
    gradients before do so again. Raises ConfigError where an adapter stands that it cannot stand
    beside.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    known = _MODELS.setdefault(model, _Model(flags))
    for other in known.adapters:
        _check_beside(kind, modules, other)
    mine = _Standing(kind, modules)
    known.adapters.append(mine)

    def leave() -> None:
        if mine in known.adapters:
            known.adapters.remove(mine)
            if not known.adapters:
                del _MODELS[model]
                for parameter, requires_grad in known.trainable:
                    parameter.requires_grad_(requires_grad)

    return leave


def check_plain(model: torch.nn.Module) -> None:
    """Raise ConfigError where an adapter stands in the model already."""
    if model in _MODELS:
        kinds = ", ".join(repr(each.kind) for each in _MODELS[model].adapters)
        raise ConfigError(
            f"adapter {kinds} stands in the model; take it off before you train another"
        )


def _check_beside(kind: str, modules: Sequence[str], other: _Standing) -> None:
    """Changes of one weight add up where both are sums of it and of what the adapter makes."""
    shared = set(modules) & set(other.modules)
    mine, theirs = KINDS[kind], KINDS[other.kind]
    if shared and not (mine.family and mine.family == theirs.family):
        raise ConfigError(
            f"adapter {kind!r} cannot stand at {min(shared)!r}, where {other.kind!r} stands: only "
            "adapters of one family that adds to weights (LoRA) stand side by side; merge one first"
        )
