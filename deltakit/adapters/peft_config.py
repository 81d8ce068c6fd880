"""The configuration of an adapter of peft, as a delta records it.

It holds peft's own names and only what its layers are made from, always spelt out, so that another
version of peft with other defaults builds the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deltakit.adapters.kinds import KINDS
from deltakit.adapters.peft_places import usual_modules
from deltakit.errors import ConfigError, nearest
from deltakit.targets.roles import is_a


def configure(
    model: torch.nn.Module, kind: str, options: Mapping[str, Any], modules: Sequence[str]
) -> dict[str, Any]:
    """See `building.Builder`.

    options: deltakit's (rank, alpha, dropout) or peft's own names of the kind's fields. Without alpha
    it is the rank, so that larger ranks are not scaled down.
    """
    record = KINDS[kind]
    config = {**record.fields, **record.fixed}
    given = {record.names.get(option, option) for option in options}
    for option, value in options.items():
        name = record.names.get(option, option)
        if name not in record.fields or name == "fan_in_fan_out":
            known = [*record.names, *record.fields]
            raise ConfigError(f"adapter {kind!r} has no option {option!r}{nearest(option, known)}")
        config[name] = value
    rank, alpha = record.names.get("rank", ""), record.names.get("alpha", "")
    if rank in given and alpha and alpha not in given:
        config[alpha] = config[rank]
    if "fan_in_fan_out" in record.fields:
        config["fan_in_fan_out"] = _is_transposed(model, modules)
    if kind == "ia3" and config["feedforward_modules"] is None:
        ends = usual_modules(model, kind, "FEEDFORWARD")
        config["feedforward_modules"] = [e for e in ends if any(m.endswith(e) for m in modules)]
    if kind == "hra" and config["r"] % 2:
        raise ConfigError(f"adapter 'hra' needs an even rank, as pairs cancel; found {config['r']}")
    return config


def _is_transposed(model: torch.nn.Module, modules: Sequence[str]) -> bool:
    """Whether weights are [in, out], as those of GPT-2's layers are; refused where layers differ."""
    transposed = [module for module in modules if is_a(model.get_submodule(module), "Conv1D")]
    if transposed and len(transposed) < len(modules):
        other = next(module for module in modules if module not in transposed)
        raise ConfigError(
            f"{transposed[0]!r} holds its weight transposed and {other!r} does not; one adapter "
            "needs layers of one kind: choose them by target"
        )
    return bool(transposed)
