"""Names for parameters that a file lists without names, in the order of a model's `parameters()`.

The order is the model class's, not the checkpoint's. So the class is built from the base's
config.json, without data, and taken only if every shape agrees.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping

from deltakit.errors import CoordinateError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.live.coordinates import Coordinates, config_changes, coordinates

Shape = tuple[int, ...]
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Order:
    """What the positions of a list of parameters mean.

    model: the class that fits ("BertForMaskedLM"), or "" where shapes alone told. live: per
    parameter its live name. where: the places of these in the base. batch_norms: per BatchNorm
    module its name in the base. config: changes to config.json that the class needs.
    """

    model: str
    live: Sequence[str]
    where: Coordinates
    batch_norms: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


def order_of(base: Checkpoint, shapes: Sequence[Shape | None], batch_norms: int) -> Order:
    """The order of the parameters of the model that a list was made of.

    shapes: of all parameters in order, None where the list does not say. batch_norms: how many
    BatchNorm modules the model has. Where the base has no config.json, shapes tell by themselves if
    no two tensors share one.

    Raises CoordinateError where no class of the base's architecture fits, or several that differ
    in names do; ConfigError without torch and transformers.
    """
    if base.directory is None or not (base.directory / "config.json").is_file():
        return _by_shape(base, shapes, batch_norms)
    fitting = []
    for name, model in _models(base.directory, _own_classes(base), shapes):
        if _fits(model, shapes, batch_norms):
            fitting += _order(name, model, base)
    if not fitting:
        raise CoordinateError(
            f"no model class for {base.path} has {len(shapes)} parameters of the shapes in the "
            "file; give as base the folder of that very model, saved with its head by "
            "save_pretrained"
        )
    others = [order for order in fitting if order.live != fitting[0].live]
    if others and fitting[0].model not in _own_classes(base):
        raise CoordinateError(
            f"{fitting[0].model} and {others[0].model} both fit the shapes in the file; give as "
            "base the folder of the right one, saved by save_pretrained"
        )
    return fitting[0]


def _own_classes(base: Checkpoint) -> list[str]:
    found = (base.config() or {}).get("architectures")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _models(
    folder: Path, own: Sequence[str], shapes: Sequence[Shape | None]
) -> Iterator[tuple[str, Any]]:
    """Models without data: of the classes that config.json names, then of all others that
    transformers has for the architecture, with as many labels as the last shape has rows."""
    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    known = [name for name in own if hasattr(transformers, name)]
    classes: dict[str, Any] = {name: getattr(transformers, name) for name in known}
    for mapping in vars(modeling_auto).values():
        if isinstance(mapping, _LazyAutoMapping) and type(config) in mapping:
            found: Any = mapping[type(config)]
            for made in found if isinstance(found, (tuple, list)) else [found]:
                classes.setdefault(made.__name__, made)
    last = next((shape for shape in reversed(shapes) if shape), None)
    for name, made in classes.items():
        for labels in dict.fromkeys([config.num_labels, *(last or ())[:1]]):
            told = copy.deepcopy(config)
            told.num_labels = labels
            with torch.device("meta"):
                yield name, made(told)


def _fits(model: nn.Module, shapes: Sequence[Shape | None], batch_norms: int) -> bool:
    found = [tuple(parameter.shape) for parameter in model.parameters()]
    norms = sum(isinstance(module, _BATCH_NORMS) for module in model.modules())
    if len(found) != len(shapes) or norms != batch_norms:
        return False
    return all(told is None or told == shape for told, shape in zip(shapes, found, strict=True))


def _order(name: str, model: nn.Module, base: Checkpoint) -> list[Order]:
    """The order by one model; nothing where its tensors do not fit the base's."""
    try:
        where = coordinates(model, base, buffers=True)
    except CoordinateError:
        return []
    norms = [n for n, module in model.named_modules() if isinstance(module, _BATCH_NORMS)]
    means = [f"{norm}.running_mean" for norm in norms]
    stored = [(where.names.get(mean) or mean).removesuffix(".running_mean") for mean in means]
    live = [name for name, _ in model.named_parameters()]
    return [Order(name, live, where, stored, config_changes(model, base))]


def _by_shape(base: Checkpoint, shapes: Sequence[Shape | None], batch_norms: int) -> Order:
    """The order of parameters none of which shares its shape with another one or a tensor."""
    names = []
    for shape in shapes:
        found = [info.name for info in base.tensors.values() if info.shape == shape]
        if len(found) != 1 or shapes.count(shape) != 1 or batch_norms:
            raise CoordinateError(
                f"{base.path} has no config.json to tell the model's order of parameters, and "
                f"{len(found)} tensors of shape {shape}; give the model's folder as base"
            )
        names += found
    return Order("", names, Coordinates({name: name for name in names}))
