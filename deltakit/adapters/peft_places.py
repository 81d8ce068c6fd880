"""Which modules an adapter of peft stands at, by the same patterns that name tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from deltakit.adapters.building import Patterns
from deltakit.errors import ConfigError
from deltakit.targets.patterns import matching
from deltakit.targets.roles import is_a


def choose_modules(
    model: torch.nn.Module,
    layers: tuple[str, ...],
    names: Mapping[str, str | None],
    target: Patterns,
    exclude: Patterns,
) -> list[str]:
    """Live names of the layers whose weights the patterns take, in the model's order.

    layers: classes of them. A preset that takes a part of a fused weight takes its layer. Raises
    ConfigError when the patterns take no such layer.
    """
    weights = {name: stored for name, stored in names.items() if name.endswith(".weight")}
    taken = matching(target, weights, "target pattern", model)
    without = matching(_listed(exclude), weights, "exclude pattern", model)
    modules = [name.removesuffix(".weight") for name in weights if name in taken.keys() - without]
    found = [module for module in modules if _can_hold(model, module, layers)]
    if not found:
        raise ConfigError(
            f"no layer is left for the adapter: target {target!r} takes no {' or '.join(layers)} whose "
            "weight the base holds"
        )
    return found


def usual_places(model: torch.nn.Module, kind: str) -> list[str]:
    """Patterns for the weights at which peft puts an adapter in models of this type."""
    return [f"*.{suffix}.weight" for suffix in usual_modules(model, kind, "TARGET")]


def usual_modules(model: torch.nn.Module, kind: str, which: str) -> list[str]:
    """Ends of the names of the modules that peft knows for models of this type, sorted.

    which: "TARGET" or "FEEDFORWARD". Raises ConfigError where it knows none.
    """
    import peft.utils.constants as known

    table = getattr(known, f"TRANSFORMERS_MODELS_TO_{kind.upper()}_{which}_MODULES_MAPPING")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in table:
        raise ConfigError(
            f"where adapter {kind!r} stands in a model of type {model_type!r} is not known; name the "
            "weights by target"
        )
    return sorted(table[model_type])


def _can_hold(model: torch.nn.Module, module: str, layers: tuple[str, ...]) -> bool:
    above = module.rpartition(".")[0]
    if is_a(model.get_submodule(above), "MultiheadAttention"):
        return False  # it uses the weight of its output layer, not the layer
    return is_a(model.get_submodule(module), *layers)


def _listed(patterns: Patterns) -> Iterable[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)
