"""What attaching asks of the module that builds a kind of adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

import torch

from deltakit.adapters.kinds import kind_of
from deltakit.dtypes import Array

Patterns = str | Iterable[str]
FROZEN = "frozen"  # member of a configuration: a digest of what `Injection.freeze` gives


@dataclass(frozen=True, eq=False)
class Injection:
    """An adapter in a model, with whatever initial values.

    parameters: live name of an adapted module, as it was before -> parameter of the adapter, as
    initial rules name it -> the tensor that is trained. A module that an adapter stands at holds the
    one that it stands for as its child `base_layer` (as in peft), by which its tensors are found
    again. remove: gives the model back the very modules that it had. freeze: of an adapter that holds
    random values which it does not train, makes them of a seed: (seed, live name of a module -> the
    base's name) -> all of them by name. weigh: of an adapter that adds to weights, lets it add so
    many times as much.
    """

    parameters: dict[str, dict[str, torch.nn.Parameter]]
    remove: Callable[[], None]
    freeze: Callable[[int, Mapping[str, str]], dict[str, Array]] | None = None
    weigh: Callable[[float], None] | None = None


class Builder(Protocol):
    """A module with these functions."""

    def choose(
        self,
        model: torch.nn.Module,
        kind: str,
        names: Mapping[str, str | None],
        target: Patterns | None,
        exclude: Patterns,
    ) -> list[str]:
        """Live names of the modules that an adapter is to stand at.

        names: live names of parameters -> names in the checkpoint, for patterns.
        """

    def configure(
        self, model: torch.nn.Module, kind: str, options: Mapping[str, Any], modules: Sequence[str]
    ) -> dict[str, Any]:
        """The configuration, plain JSON, that `inject` needs; raises ConfigError for options."""

    def inject(
        self, model: torch.nn.Module, kind: str, config: Mapping[str, Any], modules: Sequence[str]
    ) -> Injection:
        """Put the adapter into the model; a failure leaves the model as it was."""

    def initial_rules(
        self, kind: str, config: Mapping[str, Any], injection: Injection
    ) -> dict[str, dict[str, Any]]:
        """Parameter -> rule of its initial values (see `deltakit.adapter.Adapter`)."""


def builder_of(kind: str) -> Builder:
    """Raises ConfigError for a kind that is not known."""
    return cast(Builder, import_module(kind_of(kind).builder))
