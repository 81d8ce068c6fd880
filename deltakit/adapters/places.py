"""Where adapters stand in a model, and what the base's checkpoint calls it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from deltakit.dtypes import Array
from deltakit.errors import ConfigError, CoordinateError, nearest
from deltakit.formats.checkpoint import Checkpoint
from deltakit.live.arrays import to_numpy
from deltakit.live.coordinates import coordinates
from deltakit.live.plain_names import plain_names


class Places:
    """The modules of a model by their names without adapters, and the tensors of the base in them.

    names: plain live name of a parameter -> name in the checkpoint, for those that the base holds
    whole.
    """

    def __init__(self, model: torch.nn.Module, checkpoint: Checkpoint | None) -> None:
        self.model, self.checkpoint = model, checkpoint
        where = coordinates(model, checkpoint)
        plain = plain_names(model)
        found = [(plain(live), live, stored) for live, stored in where.names.items()]
        self.names = {n: s for n, live, s in found if n and s and live not in where.regions}
        self._live = {name: live for name, live, _ in found if name}
        self._modules = {_owner(stored): _owner(name) for name, stored in self.names.items()}

    def live_module(self, module: str) -> str:
        """The plain live name of what the base calls `module`."""
        if module not in self._modules:
            raise CoordinateError(
                f"the model has no module {module!r} for the adapter"
                f"{nearest(module, list(self._modules))}"
            )
        return self._modules[module]

    def base_tensor(self, module: str) -> str:
        """The checkpoint's name of a live module's weight.

        Raises CoordinateError where the base does not hold it whole or the model shares it.
        """
        name = f"{module}.weight"
        if name not in self.names:
            raise CoordinateError(
                f"no adapter can stand at {module!r}: the base does not hold its weight as one tensor"
            )
        weight = self.model.get_parameter(self._live[name])
        every = self.model.named_parameters(remove_duplicate=False)
        shared = [n for n, p in every if p is weight and n != self._live[name]]
        if shared:
            raise CoordinateError(
                f"no adapter can stand at {module!r}: its weight is also {shared[0]!r}, which "
                "merging the adapter would change too; exclude it"
            )
        return self.names[name]

    def read(self, module: str) -> Array:
        """The weight of what the base calls `module`: the checkpoint's, or else the model's."""
        name = f"{self.live_module(module)}.weight"
        if self.checkpoint is not None:
            info = self.checkpoint.info(self.names[name])
            words = self.checkpoint.words(info.name)
            return np.asarray(words.view(info.kind.numpy).reshape(info.shape))
        return to_numpy(self.model.get_parameter(self._live[name]))


def for_live_names(config: Mapping[str, Any], modules: Mapping[str, str]) -> dict[str, Any]:
    """A configuration whose patterns of ranks and the like name live modules, one each.

    modules: live name -> the base's name of its weight, for which the patterns of a delta stand.
    Raises ConfigError for a pattern that fits live names alone.
    """
    return {
        member: _live_pattern(member, value, modules) if member.endswith("_pattern") else value
        for member, value in config.items()
    }


def _live_pattern(
    member: str, patterns: Mapping[str, Any], modules: Mapping[str, str]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pattern, value in patterns.items():
        fits = re.compile(
            rf"(.*\.)?({pattern})$"
        ).match  # as in peft, where the first to fit counts
        for live, tensor in modules.items():
            if fits(_owner(tensor)):
                found.setdefault(re.escape(live), value)
            elif fits(live):
                raise ConfigError(
                    f"{member} {pattern!r} fits {live!r} alone, which the checkpoint calls "
                    f"{_owner(tensor)!r}; use the checkpoint's names"
                )
    return found


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
