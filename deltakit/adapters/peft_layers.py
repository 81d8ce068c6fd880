"""Adapters of peft, injected into a model and taken out of it again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from deltakit.adapters.building import FROZEN, Injection, Patterns
from deltakit.adapters.kinds import KINDS
from deltakit.adapters.peft_config import configure
from deltakit.adapters.peft_frozen import FREEZE
from deltakit.adapters.peft_initial import initial_rules
from deltakit.adapters.peft_places import choose_modules, usual_places
from deltakit.errors import ConfigError
from deltakit.targets.roles import is_a

__all__ = ["choose", "configure", "initial_rules", "inject"]

_NAME = "default"  # of an adapter in peft


def choose(
    model: torch.nn.Module,
    kind: str,
    names: Mapping[str, str | None],
    target: Patterns | None,
    exclude: Patterns,
) -> list[str]:
    """See `building.Builder`."""
    record = KINDS[kind]
    wanted = target or record.target or usual_places(model, kind)
    return choose_modules(model, record.layers, names, wanted, exclude)


def inject(
    model: torch.nn.Module, kind: str, config: Mapping[str, Any], modules: Sequence[str]
) -> Injection:
    """See `building.Builder`."""
    training = {module: model.get_submodule(module).training for module in modules}
    active = _active_adapters(model)
    known = model.__dict__.get("peft_config")
    name = _free_name(model)

    def remove() -> None:
        for module in modules:
            _take_out(model, module, name)

    try:
        _inject(model, kind, config, modules, name)
    except Exception as error:  # of any type, by kind and option; the model goes back either way
        remove()
        why = " ".join(str(error).split())
        raise ConfigError(f"adapter {kind!r}: peft does not attach it: {why}") from error
    finally:
        model.__dict__.pop("peft_config", None)
        if known is not None:
            model.peft_config = known  # a PeftModel's own, that the user made
        for path, names in active.items():
            layer: Any = model.get_submodule(path)
            layer.set_adapter([*names, *([name] if path in training else [])])
    layers: dict[str, Any] = {
        module: model.get_submodule(module).train(mode) for module, mode in training.items()
    }
    record = KINDS[kind]
    freeze = FREEZE.get(record.peft)
    return Injection(
        parameters={module: _parameters(layer, name) for module, layer in layers.items()},
        remove=remove,
        freeze=freeze and partial(freeze, layers, name),
        weigh=_weigher([layer.scaling for layer in layers.values()], name)
        if record.family
        else None,
    )


def _weigher(scalings: Sequence[dict[str, float]], name: str) -> Callable[[float], None]:
    before = [scaling[name] for scaling in scalings]

    def weigh(weight: float) -> None:
        for scaling, value in zip(scalings, before, strict=True):
            scaling[name] = value * weight

    return weigh


def _inject(
    model: torch.nn.Module, kind: str, config: Mapping[str, Any], modules: Sequence[str], name: str
) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import cast_adapter_dtype
    from peft.utils import PeftType

    tuner = PeftType(KINDS[kind].peft)
    kind_of_config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[tuner]
    with _quiet(), torch.random.fork_rng():  # a run's own draws do not depend on its adapter
        torch.manual_seed(0)
        given = kind_of_config(
            **{member: value for member, value in config.items() if member != FROZEN},
            target_modules="|".join(re.escape(module) for module in modules),
        )
        PEFT_TYPE_TO_TUNER_MAPPING[tuner](model, given, name)
    cast_adapter_dtype(model, name)  # float32 where the base has 16 bits


def _free_name(model: torch.nn.Module) -> str:
    """A name that no adapter in the model has and that stands in no name of its tensors."""
    taken = {part for name, _ in model.named_parameters() for part in name.split(".")}
    taken |= set(getattr(model, "peft_config", ()))
    names = [_NAME, *(f"{_NAME}_{n}" for n in range(1, len(taken) + 1))]
    return next(name for name in names if name not in taken)


def _parameters(layer: torch.nn.Module, name: str) -> dict[str, torch.nn.Parameter]:
    """Parameter as rules name it -> the tensor, of the adapter called `name` at a layer."""
    found = {}
    for path, parameter in layer.named_parameters():
        parts = path.split(".")
        if parts[0] != "base_layer" and name in parts and parameter.requires_grad:
            parts.remove(name)
            found[".".join(parts)] = parameter
    return found


def _active_adapters(model: torch.nn.Module) -> dict[str, list[str]]:
    """Path of a layer of peft -> the adapters that it uses now."""
    modules: Any = model.named_modules()
    return {path: list(m.active_adapters) for path, m in modules if is_a(m, "BaseTunerLayer")}


def _take_out(model: torch.nn.Module, module: str, name: str) -> None:
    layer: Any = model.get_submodule(module)
    if not is_a(layer, "BaseTunerLayer"):
        return
    layer.delete_adapter(name)
    if not layer._all_available_adapter_names():
        path, _, leaf = module.rpartition(".")
        setattr(model.get_submodule(path), leaf, layer.base_layer)


@contextmanager
def _quiet() -> Iterator[None]:
    """peft warns of what is settled here: the layers' orientation, several adapters in a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
