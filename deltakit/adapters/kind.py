"""What is known of one kind of adapter without building it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of adapter.

    builder: module that builds it (see `deltakit.adapters.building`). folds: whether what it does to
    a module is a change of the module's weight that can be merged. peft: its type in peft, "" for
    kinds of our own. fields: what its configuration holds -> default. names: deltakit's option -> the
    field that it sets. fixed: what else the configuration always holds. target: where it stands by
    default; "" for where peft puts it in models of the same type. layers: classes of the layers that
    it can stand at. family: kinds of one family stand side by side at one module; "" for none.
    """

    builder: str
    folds: bool = False
    peft: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    target: str = "attention-qv"
    layers: tuple[str, ...] = ("Linear",)
    family: str = ""
