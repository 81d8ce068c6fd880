"""Bottleneck adapters in a model: the builder of the kinds houlsby, pfeiffer and parallel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from deltakit.adapters.bottleneck_config import bottleneck_config, bottleneck_rules
from deltakit.adapters.bottleneck_module import CHILD, BottleneckAdapter, Source, adapted
from deltakit.adapters.bottleneck_places import bottleneck_places, widths
from deltakit.adapters.building import Injection, Patterns
from deltakit.adapters.kinds import KINDS
from deltakit.errors import ConfigError, CoordinateError, nearest
from deltakit.targets.patterns import matching


def choose(
    model: torch.nn.Module,
    kind: str,
    names: Mapping[str, str | None],
    target: Patterns | None,
    exclude: Patterns,
) -> list[str]:
    """See `building.Builder`. Of the places of the kind, those whose weights the patterns take."""
    weights = {name: stored for name, stored in names.items() if name.endswith(".weight")}
    taken = matching(target or KINDS[kind].target, weights, "target pattern", model)
    listed = [exclude] if isinstance(exclude, str) else list(exclude)
    without = matching(listed, weights, "exclude pattern", model)
    places = bottleneck_places(model, kind)
    found = [place for place in places if f"{place}.weight" in taken.keys() - without]
    if not found:
        raise ConfigError(
            f"no layer is left for adapter {kind!r}: target {target!r} takes none of the layers that "
            f"it can stand at, such as {next(iter(places))!r}"
        )
    return found


def configure(
    model: torch.nn.Module, kind: str, options: Mapping[str, Any], modules: Sequence[str]
) -> dict[str, Any]:
    """See `building.Builder` and `bottleneck_config`."""
    return bottleneck_config(kind, options)


def initial_rules(
    kind: str, config: Mapping[str, Any], injection: Injection
) -> dict[str, dict[str, Any]]:
    """See `building.Builder` and `bottleneck_rules`."""
    return bottleneck_rules(config)


def inject(
    model: torch.nn.Module, kind: str, config: Mapping[str, Any], modules: Sequence[str]
) -> Injection:
    """See `building.Builder`. The base's parameters require no gradients then.

    They lie on the device of the layers that they stand at, in float32, or float64 beside such
    weights. Raises CoordinateError for a module where the kind has no place.
    """
    places = bottleneck_places(model, kind)
    for module in modules:
        if module not in places:
            raise CoordinateError(
                f"adapter {kind!r} cannot stand at {module!r}{nearest(module, list(places))}"
            )
    undo: list[Callable[[], None]] = []

    def remove() -> None:
        while undo:
            undo.pop()()

    found = {}
    model.requires_grad_(requires_grad=False)
    try:
        for module in modules:
            reads = None if places[module] == module else model.get_submodule(places[module])
            adapter = _put(model.get_submodule(module), config, reads, undo)
            found[module] = {f"{CHILD}.{path}": p for path, p in adapter.named_parameters()}
    except BaseException:
        remove()
        raise
    return Injection(found, remove)


def _put(
    layer: Any,
    config: Mapping[str, Any],
    reads: torch.nn.Module | None,
    undo: list[Callable[[], None]],
) -> BottleneckAdapter:
    """Put an adapter at a layer; `undo` gets what takes it away again, last first."""
    source = None
    if reads is not None:
        source = Source()
        undo.append(reads.register_forward_pre_hook(source).remove)
    weight: torch.Tensor = layer.weight
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    adapter = BottleneckAdapter(widths(layer)[1], config, source, weight.device, dtype)
    layer.add_module(CHILD, adapter.train(layer.training))
    undo.append(partial(delattr, layer, CHILD))
    undo.append(layer.register_forward_hook(adapted).remove)
    return adapter
