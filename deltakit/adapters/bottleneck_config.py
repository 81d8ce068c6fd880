"""The configuration of bottleneck adapters: options and their defaults, and the initial values."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, sqrt
from typing import Any

from deltakit.adapter import FAN_IN
from deltakit.adapters.kinds import KINDS
from deltakit.errors import ConfigError, nearest

ACTIVATIONS = (
    *("relu", "gelu", "gelu_tanh", "silu", "swish", "tanh", "sigmoid", "leaky_relu", "elu"),
    "identity",
)
ZERO = "zero"


def bottleneck_config(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The complete configuration of an adapter of a kind, plain JSON.

    reduction_factor: the width that the adapter reads over that of its bottleneck, rounded down to
    at least 1. bottleneck: that width itself, instead. activation: one of `ACTIVATIONS`. scaling: of
    what the adapter adds. residual: whether it adds to what it stands at or replaces that. initial:
    standard deviation of both weights' initial values, or "zero" for an up-projection of zeros (then
    the down-projection is uniform within 1 / sqrt(inputs)).

    Complete configurations are options too, and stay as they are. Raises ConfigError for options
    that do not fit.
    """
    record = KINDS[kind]
    config = dict(record.fields)
    for option, value in options.items():
        name = record.names.get(option, option)
        if name not in config:
            known = [*record.names, *config]
            raise ConfigError(f"adapter {kind!r} has no option {option!r}{nearest(option, known)}")
        config[name] = value
    if config["bottleneck"] is not None and "reduction_factor" not in options:
        config["reduction_factor"] = None
    _check(kind, config)
    return config


def bottleneck_rules(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Parameter -> rule of its initial values (see `deltakit.adapter.Adapter`); biases are zero.

    A uniform distribution within (-b, b) has the standard deviation b / sqrt(3).
    """
    initial = config["initial"]
    spread = {"uniform": FAN_IN if initial == ZERO else sqrt(3) * initial}
    return {
        "adapter.down.weight": spread,
        "adapter.down.bias": {"constant": 0},
        "adapter.up.weight": {"constant": 0} if initial == ZERO else spread,
        "adapter.up.bias": {"constant": 0},
    }


def bottleneck_width(config: Mapping[str, Any], width: int) -> int:
    """The width of the bottleneck of an adapter that reads `width` features."""
    if config["bottleneck"] is not None:
        return int(config["bottleneck"])
    return max(1, int(width / config["reduction_factor"]))


def _check(kind: str, config: Mapping[str, Any]) -> None:
    size, factor = config["bottleneck"], config["reduction_factor"]
    if (size is None) == (factor is None):
        raise ConfigError(f"adapter {kind!r} takes one of bottleneck and reduction_factor")
    if size is not None and (type(size) is not int or size < 1):
        raise ConfigError(
            f"adapter {kind!r}: bottleneck must be a whole number from 1, not {size!r}"
        )
    if factor is not None and not (_is_number(factor) and factor > 0):
        raise ConfigError(f"adapter {kind!r}: reduction_factor must be above 0, not {factor!r}")
    activation = config["activation"]
    if activation not in ACTIVATIONS:
        hint = nearest(str(activation), list(ACTIVATIONS))
        raise ConfigError(
            f"adapter {kind!r}: no activation {activation!r}{hint}; known: {', '.join(ACTIVATIONS)}"
        )
    if not _is_number(config["scaling"]):
        raise ConfigError(f"adapter {kind!r}: scaling must be a number, not {config['scaling']!r}")
    if type(config["residual"]) is not bool:
        raise ConfigError(f"adapter {kind!r}: residual must be true or false")
    if kind == "parallel" and not config["residual"]:
        raise ConfigError("adapter 'parallel' adds to the feed-forward; residual cannot be false")
    initial = config["initial"]
    if initial != ZERO and not (_is_number(initial) and initial > 0):
        raise ConfigError(
            f"adapter {kind!r}: initial must be a standard deviation above 0 or 'zero', "
            f"not {initial!r}"
        )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)
