"""The kinds of adapters: their names, what they are, and where what builds them stands.

A kind's builder is imported when an adapter is attached, so that knowing the kinds needs no torch.
"""

from __future__ import annotations

from deltakit.adapters.bottleneck_kinds import BOTTLENECK_KINDS
from deltakit.adapters.kind import Kind
from deltakit.adapters.peft_kinds import PEFT_KINDS, REFUSED
from deltakit.errors import ConfigError
from deltakit.registry import Registry

KINDS: Registry[Kind] = Registry("adapter")

for _name, (_summary, _source, _kind) in {**PEFT_KINDS, **BOTTLENECK_KINDS}.items():
    KINDS.register(_name, _summary, _source)(_kind)


def kind_of(name: str) -> Kind:
    """The kind called `name`; raises ConfigError, with the reason for kinds that are not built."""
    if name in REFUSED:
        raise ConfigError(f"adapter {name!r} is not built here: {REFUSED[name]}")
    return KINDS[name]
