"""Attaching adapters to a live model, with initial or trained values, and taking them off again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from deltakit.adapter import Adapter
from deltakit.adapters.building import FROZEN, Injection, Patterns, builder_of
from deltakit.adapters.computed import from_base
from deltakit.adapters.initial import STORED, all_initial_values, check_value, with_entries
from deltakit.adapters.places import Places, for_live_names
from deltakit.adapters.standing import check_plain, enter
from deltakit.adapters.tensors import by_tensor_name, check_tensors, fill, initial_of, owner_of
from deltakit.delta import BaseIdentity, SparseDelta
from deltakit.dtypes import Array
from deltakit.errors import BaseMismatchError, ConfigError, DeltaError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import identify
from deltakit.live.coordinates import Coordinates, coordinates, open_base
from deltakit.quantized.loftq import check_codes


@dataclass(eq=False)
class Attached:
    """An adapter in a model.

    adapter: what a delta of it records. parameters: name of an adapter's tensor, as in a delta ->
    the tensor, in tensor order. where: live names as they are now -> names in the checkpoint, the
    adapter's own included. modules: the checkpoint's name of an adapted module -> the tensor of the
    base at which the adapter stands. initial: its tensors' initial values. stored: extras that a
    delta needs to rebuild those.
    """

    model: torch.nn.Module
    adapter: Adapter
    parameters: dict[str, torch.nn.Parameter]
    where: Coordinates
    modules: dict[str, str]
    initial: Mapping[str, Array]
    stored: dict[str, Array]
    injection: Injection

    def identity(self, checkpoint: Checkpoint) -> BaseIdentity:
        """Fingerprints of the base's tensors at which the adapter stands, of their samples alone."""
        return identify(checkpoint, dict.fromkeys(self.modules.values()))

    def reset(self) -> None:
        """Give the adapter its initial values back."""
        fill(self.parameters, self.initial)

    def weigh(self, weight: float) -> None:
        """Let the adapter add `weight` times what it was trained to add to the weights.

        Raises ConfigError for other weights than 1 where it does not add to weights.
        """
        if self.injection.weigh is not None:
            self.injection.weigh(weight)
        elif weight != 1:
            raise ConfigError(
                f"adapter {self.adapter.kind!r} applies with weight 1 alone, found {weight}: what it "
                "does is no sum with the weights"
            )

    def detach(self) -> None:
        """Give the model back its plain modules, their bits untouched."""
        self.injection.remove()


def attach(
    model: torch.nn.Module,
    kind: str,
    options: Mapping[str, Any] | None = None,
    *,
    target: Patterns | None = None,
    exclude: Patterns = (),
    seed: int = 0,
    base: str | os.PathLike[str] | Checkpoint | None = None,
) -> Attached:
    """Put a new adapter into a model, in place, with the initial values that the seed gives.

    kind: one of `deltakit.adapters.kinds.KINDS`. options: rank, alpha, dropout, … of the kind. target,
    exclude: presets and patterns of tensors (see `deltakit.targets`); an adapter stands at the
    modules whose weights they take. base: the checkpoint that the model was loaded from, found
    through the model by default; without one live names are names.

    The adapter's parameters require gradients then, no others do, until it is taken off. Raises
    ConfigError for options and patterns that do not fit and where an adapter stands in the model,
    CoordinateError for modules whose weights the checkpoint holds rearranged or the model shares.
    """
    builder = builder_of(kind)
    check_plain(model)
    places = Places(model, open_base(model, base))
    chosen = builder.choose(model, kind, places.names, target, exclude)
    config = builder.configure(model, kind, options or {}, chosen)
    modules = {module: places.base_tensor(module) for module in chosen}
    injection = _inject(model, kind, config, modules)
    with _undone_on_failure(injection):
        config = _frozen(kind, config, seed, injection, modules)
        named = by_tensor_name(injection, modules)
        rules = builder.initial_rules(kind, config, injection)
        adapter = Adapter(kind=kind, config=config, seed=seed, initial=rules, check="0" * 16)
        computed = from_base(adapter, places.read)
        values = {name: initial_of(adapter, name, p, computed) for name, p in named.items()}
        adapter = replace(adapter, check=check_value(kind, config, values))
        _load(model, named, values)
        return _attached(adapter, named, values, places, modules, injection)


def reattach(
    model: torch.nn.Module,
    delta: SparseDelta,
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
) -> Attached:
    """Put the adapter of a delta into a model, in place, with its trained values.

    Raises DeltaError for a delta of no adapter, CoordinateError for modules that the model lacks,
    BaseMismatchError where the initial values rebuilt are not those that it was trained from.
    Whether the model is the delta's base is the caller's to check.
    """
    adapter = delta.adapter
    if adapter is None:
        raise DeltaError("the delta is one of base weights, not of an adapter; use dk.apply")
    places = Places(model, open_base(model, base))
    names = dict.fromkeys(adapter.split(name)[0] for name in delta.tensors)
    modules = {live: places.base_tensor(live) for live in map(places.live_module, names)}
    check_codes(model, adapter, list(modules))
    initial = all_initial_values(delta, from_base(adapter, places.read))
    injection = _inject(model, adapter.kind, adapter.config, modules)
    with _undone_on_failure(injection):
        drawn = _frozen(adapter.kind, adapter.config, adapter.seed, injection, modules)
        if drawn != adapter.config:
            raise BaseMismatchError(
                f"adapter {adapter.kind!r}: its seed and configuration draw other random values than "
                "it was trained with (their check value differs); the file is damaged"
            )
        named = by_tensor_name(injection, modules)
        check_tensors(named, delta)
        _load(model, named, with_entries(delta, initial))
        return _attached(adapter, named, initial, places, modules, injection)


def _inject(
    model: torch.nn.Module, kind: str, config: Mapping[str, Any], modules: Mapping[str, str]
) -> Injection:
    live, places = for_live_names(config, modules), list(modules)
    leave = enter(model, kind, places)
    try:
        injection = builder_of(kind).inject(model, kind, live, places)
    except BaseException:
        leave()
        raise

    def remove() -> None:
        injection.remove()
        leave()

    return replace(injection, remove=remove)


def _frozen(
    kind: str,
    config: Mapping[str, Any],
    seed: int,
    injection: Injection,
    modules: Mapping[str, str],
) -> dict[str, Any]:
    """The configuration, with a digest of the random values that the adapter holds untrained."""
    plain = {member: value for member, value in config.items() if member != FROZEN}
    if injection.freeze is None:
        return plain
    drawn = injection.freeze(seed, {live: owner_of(tensor) for live, tensor in modules.items()})
    return {**plain, FROZEN: check_value(kind, plain, drawn)}


def _load(
    model: torch.nn.Module, named: Mapping[str, torch.nn.Parameter], values: Mapping[str, Array]
) -> None:
    """Values into the adapter's parameters, which alone require gradients from now on."""
    model.requires_grad_(requires_grad=False)
    fill(named, values)
    for parameter in named.values():
        parameter.requires_grad = True


def _attached(
    adapter: Adapter,
    named: dict[str, torch.nn.Parameter],
    initial: Mapping[str, Array],
    places: Places,
    modules: Mapping[str, str],
    injection: Injection,
) -> Attached:
    model = places.model
    where = coordinates(model, places.checkpoint, buffers=True)
    ours = {id(parameter): name for name, parameter in named.items()}
    mine = {n: ours[id(p)] for n, p in model.named_parameters() if id(p) in ours}
    stands_at = {owner_of(tensor): tensor for tensor in modules.values()}
    stored = {
        STORED + name: values
        for name, values in initial.items()
        if "stored" in adapter.initial[adapter.split(name)[1]]
    }
    where = replace(where, names={**where.names, **mine})
    return Attached(model, adapter, named, where, stands_at, initial, stored, injection)


@contextmanager
def _undone_on_failure(injection: Injection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        injection.remove()
        raise
