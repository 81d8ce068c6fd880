"""What a delta says of an adapter: modules beside the base's own, whose tensors it trains.

The tensors of such a delta are the adapter's: `encoder.layer.0.attention.self.query.lora_A.weight`
is the parameter `lora_A.weight` of the adapter at the module whose weight the base checkpoint calls
`encoder.layer.0.attention.self.query.weight`. Entries are differences to the adapter's initial
values, which cost no bytes: rules and a seed give them (`deltakit.adapters.initial`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from deltakit.errors import DeltaError, nearest

FAN_IN = "fan-in"
RULES = ("constant", "uniform", "computed", "stored")
MAX_SEED = 2**64 - 1
_CHECK = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """How to rebuild an adapter up to the entries of its delta.

    kind: its name among `deltakit.adapters.kinds`, such as "lora". config: plain JSON, what its
    modules are made from. seed: 0 to 2^64 - 1, of the initial values. initial: parameter of one
    adapter ("lora_A.weight") -> rule, {"constant": c}, {"uniform": b} for values within (-b, b),
    {"uniform": "fan-in"} for b = 1 / sqrt(inputs), {"computed": how} for values that follow from the
    base's, or {"stored": true} for values that stand among the extras. check: 16 hexadecimal digits
    of a digest of kind, config and all initial values.

    Raises DeltaError when any of this does not hold.
    """

    kind: str
    config: Mapping[str, Any]
    seed: int
    initial: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    check: str

    def __post_init__(self) -> None:
        if type(self.seed) is not int or not 0 <= self.seed <= MAX_SEED:
            raise DeltaError(f"adapter {self.kind!r}: seed {self.seed!r} is not within 0..2^64-1")
        if not _CHECK.fullmatch(self.check):
            raise DeltaError(f"adapter {self.kind!r}: check must be 16 hexadecimal digits")
        if not self.initial:
            raise DeltaError(f"adapter {self.kind!r}: no parameter has an initial value")
        for parameter, rule in self.initial.items():
            if not _is_rule(rule):
                raise DeltaError(
                    f"adapter {self.kind!r}: the initial value of {parameter!r} cannot be {rule!r}"
                )

    def split(self, name: str) -> tuple[str, str]:
        """The module and the parameter in a tensor's name.

        Raises DeltaError for a name that ends with none of the adapter's parameters.
        """
        found = [parameter for parameter in self.initial if name.endswith("." + parameter)]
        if not found:
            hint = nearest(name.rpartition(".")[2], list(self.initial))
            raise DeltaError(
                f"tensor {name!r} is none of adapter {self.kind!r}; its parameters are "
                f"{', '.join(self.initial)}{hint}"
            )
        parameter = max(found, key=len)
        return name[: -len(parameter) - 1], parameter


def _is_rule(rule: Any) -> bool:
    if not isinstance(rule, Mapping) or len(rule) != 1:
        return False
    ((kind, value),) = rule.items()
    if kind == "constant":
        return _is_number(value)
    if kind == "uniform":
        return value == FAN_IN or (_is_number(value) and value > 0)
    return (kind == "computed" and isinstance(value, str)) or (kind == "stored" and value is True)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)
