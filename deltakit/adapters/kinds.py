"""The kinds of adapters: their names, what they are, and where what builds them stands.

A kind's `builder` is a module with three functions (see `deltakit.adapters.building`); it is
imported when an adapter is attached, so that knowing the kinds needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltakit.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of adapter.

    builder: module that builds it. folds: whether what it does to a module is a change of the
    module's weight. peft: its type in peft, "" for kinds of our own. fields: what its configuration
    holds -> default (see `deltakit.adapters.peft_config`). names: deltakit's option -> the member
    of the configuration that it sets. fixed: members that are always so. target: where it
    stands by default. family: kinds of one family stand side by side at one module; "" for none.
    """

    builder: str
    folds: bool
    peft: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    target: str = "attention-qv"
    family: str = ""


KINDS: Registry[Kind] = Registry("adapter")

_PEFT = "deltakit.adapters.peft_layers"
_RANKS = {"rank_pattern": {}, "alpha_pattern": {}}
_LORA = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "fan_in_fan_out": False}
_LORA_NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}

KINDS.register(
    "lora", "adds the product of two thin matrices to a weight", "Hu et al., 2021, arXiv 2106.09685"
)(
    Kind(
        builder=_PEFT,
        folds=True,
        peft="LORA",
        fields={**_LORA, **_RANKS},
        names=_LORA_NAMES,
        family="lora",
    )
)
