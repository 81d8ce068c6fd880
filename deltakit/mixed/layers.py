"""Which layer of a model takes care of which changes of its tensors in a mixed batch."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from deltakit.errors import ConfigError
from deltakit.mixed.changes import Change
from deltakit.mixed.embedding import BatchedEmbedding
from deltakit.mixed.linear import BatchedLinear
from deltakit.mixed.module import BatchedModule, Place
from deltakit.mixed.positions import LAYER, BatchedPositions, makes_positions
from deltakit.mixed.rows import Rows
from deltakit.quantized.layers import is_quantised, quantised_layers

Hook = Callable[[Rows, tuple[Any, ...], Mapping[str, Any], Any], Any]

_ALONE = "; run the tasks one by one (dk.applied)"


@dataclass(frozen=True, eq=False)
class Layers:
    """What a mixed batch puts into a model: hooks behind modules, and position biases."""

    hooks: list[tuple[torch.nn.Module, Hook]] = field(default_factory=list)
    positions: list[BatchedPositions] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Found:
    """A place of a changed tensor, the module that takes care of it, and what tasks change."""

    place: Place
    unit: str
    tensor: str
    changes: Mapping[int, Change]


def plan(model: torch.nn.Module, changes: Mapping[str, Mapping[int, Change]], tasks: int) -> Layers:
    """changes: live name of a tensor -> task, from 1 to `tasks` -> its change.

    A tied tensor is taken care of wherever it stands. Raises ConfigError for tensors whose layers
    cannot run rows of several tasks at once.
    """
    modules = dict(model.named_modules())
    found = _find(model, changes)
    again = {each.unit for each in found if _runs_again(modules, each)}
    again = {unit for unit in again if not any(_is_below(unit, other) for other in again)}
    groups = defaultdict(list)
    for each in found:
        above = (unit for unit in again if each.unit == unit or _is_below(each.unit, unit))
        groups[next(above, each.unit)].append(each)
    layers = Layers()
    for unit, members in groups.items():
        _check(model, modules, unit, members)
        module = modules[unit]
        if unit in again:
            layers.hooks.append((module, _module(unit, module, members)))
        elif isinstance(module, torch.nn.Embedding):
            (only,) = members
            if _is_positions(modules, unit):
                attention = modules[_above(unit)]
                layers.positions.append(BatchedPositions(attention, only.changes))
            else:
                scale = getattr(module, "embed_scale", None)
                shape = module.num_embeddings, module.embedding_dim
                layers.hooks.append((module, BatchedEmbedding(unit, shape, only.changes, scale)))
        else:
            by_name = {each.place.name: each.changes for each in members}
            parts = by_name.get("weight", {}), by_name.get("bias", {})
            hook = BatchedLinear(unit, _shape(module), *parts, tasks, transposed=_is_conv1d(module))
            layers.hooks.append((module, hook))
    return layers


def is_model(module: torch.nn.Module) -> bool:
    """Whether a module is a model of transformers, which may be called by itself."""
    return hasattr(module, "main_input_name")


def quantised_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Live name -> [out, in] of the weights that the codes of quantised linear layers stand for."""
    return {name: _shape(layer) for name, layer in quantised_layers(model).items()}


def _find(model: torch.nn.Module, changes: Mapping[str, Mapping[int, Change]]) -> list[_Found]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    names = {id(tensors[name]): name for name in changes}
    found = []
    for path, module in model.named_modules():
        for local, tensor in (*module._parameters.items(), *module._buffers.items()):
            if id(tensor) in names:
                name = names[id(tensor)]
                unit = _unit(path, module)
                found.append(_Found(Place(module, local), unit, name, changes[name]))
    return found


def _unit(path: str, module: torch.nn.Module) -> str:
    """The module whose call uses a module's tensors, and which is given the batch's rows."""
    parts = path.split(".")
    if "experts" in parts[:-1]:  # experts of their own see the tokens that a router picks for them
        return ".".join(parts[: parts.index("experts")])
    if type(module) is torch.nn.modules.linear.NonDynamicallyQuantizableLinear:
        return _above(path)  # a projection that attention uses without calling it
    return path


def _runs_again(modules: Mapping[str, torch.nn.Module], found: _Found) -> bool:
    module = modules[found.unit]
    if module is not found.place.module or _has_whole(found):
        return True
    if found.place.name == "weight" and _is_embedding(module):
        return False
    return found.place.name not in ("weight", "bias") or not _is_linear(module)


def _check(
    model: torch.nn.Module, modules: Mapping[str, torch.nn.Module], unit: str, members: list[_Found]
) -> None:
    tensor, module = members[0].tensor, modules[unit]
    if (module is model or is_model(module)) and next(module.children(), None) is not None:
        raise ConfigError(
            f"tensor {tensor!r} belongs to a whole model and not to a layer of it, so rows of "
            f"one batch cannot have their own{_ALONE}"
        )
    if isinstance(module, torch.nn.RNNBase):
        raise ConfigError(
            f"tensor {tensor!r} belongs to a {type(module).__name__}, whose rows cannot have "
            f"weights of their own{_ALONE}"
        )
    path = unit
    while path:
        if getattr(modules[path], "batch_first", True) is False:
            raise ConfigError(
                f"tensor {tensor!r}: module {path!r} has the batch as second dimension "
                f"(batch_first=False), expected as first{_ALONE}"
            )
        path = _above(path)
    if "relative" in unit.rpartition(".")[2] and not _is_positions(modules, unit):
        raise ConfigError(
            f"tensor {tensor!r} makes relative positions, for all rows at once{_ALONE}"
        )
    for each in members:
        whole = _has_whole(each) or _runs_again(modules, each)
        if whole and is_quantised(each.place.module) and each.place.name == "weight":
            raise ConfigError(
                f"tensor {each.tensor!r} is quantised in the model, so rows of one batch can have "
                f"entries of their own there, but no tensor of their own{_ALONE}"
            )


def _module(unit: str, module: torch.nn.Module, members: list[_Found]) -> BatchedModule:
    by_task: dict[int, list[tuple[Place, Change]]] = defaultdict(list)
    for each in members:
        for task, change in each.changes.items():
            by_task[task].append((each.place, change))
    return BatchedModule(unit, module, by_task)


def _has_whole(found: _Found) -> bool:
    return any(change.whole is not None for change in found.changes.values())


def _is_linear(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Linear or _is_conv1d(module) or is_quantised(module)


def _is_embedding(module: torch.nn.Module) -> bool:
    if not isinstance(module, torch.nn.Embedding) or module.max_norm is not None:
        return False
    kind = type(module)
    return kind is torch.nn.Embedding or kind.__name__.endswith("ScaledWordEmbedding")


def _is_conv1d(module: torch.nn.Module) -> bool:
    # Where nothing has imported transformers, no layer is of its kind.
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and type(module) is transformers.Conv1D


def _is_positions(modules: Mapping[str, torch.nn.Module], unit: str) -> bool:
    return unit.rpartition(".")[2] == LAYER and makes_positions(modules[_above(unit)])


def _shape(linear: Any) -> tuple[int, int]:
    if _is_conv1d(linear):
        return linear.nf, linear.nx
    return linear.out_features, linear.in_features


def _above(path: str) -> str:
    return path.rpartition(".")[0]


def _is_below(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))
