"""Which modules an adapter of peft stands at, by the same patterns that name tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from deltakit.adapters.building import Patterns
from deltakit.errors import ConfigError
from deltakit.targets.patterns import matching
from deltakit.targets.roles import is_a

_LAYERS = ("Linear", "Conv1D", "Conv2d", "Embedding")


def choose_modules(
    model: torch.nn.Module, names: Mapping[str, str | None], target: Patterns, exclude: Patterns
) -> list[str]:
    """Live names of the layers whose weights the patterns take, in the model's order.

    A preset that takes a part of a fused weight takes its layer. Raises ConfigError when the
    patterns take no layer that an adapter can stand at.
    """
    weights = {name: stored for name, stored in names.items() if name.endswith(".weight")}
    taken = matching(target, weights, "target pattern", model)
    without = matching(_listed(exclude), weights, "exclude pattern", model)
    modules = [name.removesuffix(".weight") for name in weights if name in taken.keys() - without]
    found = [module for module in modules if _can_hold(model, module)]
    if not found:
        raise ConfigError(
            f"no layer is left for the adapter: target {target!r} takes none of "
            f"{', '.join(_LAYERS)} whose weight the base holds"
        )
    return found


def _can_hold(model: torch.nn.Module, module: str) -> bool:
    above = module.rpartition(".")[0]
    if is_a(model.get_submodule(above), "MultiheadAttention"):
        return False  # it uses the weight of its output layer, not the layer
    return is_a(model.get_submodule(module), *_LAYERS)


def _listed(patterns: Patterns) -> Iterable[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)
