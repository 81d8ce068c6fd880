"""Weights of deltas: one number, or one for each pattern of tensor names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from deltakit.errors import ConfigError, nearest

Weight = float | Mapping[str, float]
REST = "*"


def checked_weights(
    weights: Sequence[Weight] | None, count: int, names: Sequence[str]
) -> list[Weight]:
    """One weight for each of `count` deltas; 1 by default.

    A mapping gives weights by shell patterns over tensor names: the first that matches counts, "*"
    (1 where it is absent) for what no other matches. Raises ConfigError for another number of
    weights, for what is no finite number, and for patterns that match none of `names`.
    """
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ConfigError(f"{len(weights)} weights for {count} deltas; give one for each")
    return [_checked(weight, names) for weight in weights]


def weight_of(weight: Weight, name: str) -> float:
    """The weight in tensor `name`."""
    if not isinstance(weight, Mapping):
        return weight
    for pattern, found in weight.items():
        if pattern != REST and fnmatchcase(name, pattern):
            return found
    return weight.get(REST, 1.0)


def _checked(weight: Any, names: Sequence[str]) -> Weight:
    if not isinstance(weight, Mapping):
        return _number(weight)
    for pattern in weight:
        if pattern != REST and not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"the weight for {pattern!r} matches no tensor{nearest(pattern, names)}"
            )
    return {pattern: _number(found) for pattern, found in weight.items()}


def _number(weight: Any) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError):
        raise ConfigError(f"weight {weight!r} is no number") from None
    if not math.isfinite(number):
        raise ConfigError(f"weight {number} is not finite")
    return number
