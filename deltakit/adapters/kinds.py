"""The kinds of adapters: their names, what they are, and where what builds them stands.

A kind's builder is imported when an adapter is attached, so that knowing the kinds needs no torch.
"""

from __future__ import annotations

from typing import Any

from deltakit.adapters.kind import Kind
from deltakit.adapters.peft_kinds import PEFT_KINDS, REFUSED
from deltakit.errors import ConfigError
from deltakit.registry import Registry

KINDS: Registry[Kind] = Registry("adapter")

for _name, (_summary, _source, _kind) in PEFT_KINDS.items():
    KINDS.register(_name, _summary, _source)(_kind)


def kind_of(name: str) -> Kind:
    """The kind called `name`; raises ConfigError, with the reason for kinds that are not built."""
    if name in REFUSED:
        raise ConfigError(f"adapter {name!r} is not built here: {REFUSED[name]}")
    return KINDS[name]


_BOTTLENECK: dict[str, Any] = {"bottleneck": None, "reduction_factor": 16}
_BOTTLENECK |= {"activation": "relu", "scaling": 1.0, "residual": True, "initial": 0.02}


def _bottleneck(**fields: Any) -> Kind:
    """See `deltakit.adapters.bottleneck_config` for the fields."""
    return Kind(
        builder="deltakit.adapters.bottleneck",
        folds=False,
        fields={**_BOTTLENECK, **fields},
        names={"rank": "bottleneck"},  # He et al. (2022) call it r, too
        target="all-linear",
    )


KINDS.register(
    "houlsby",
    "bottlenecks after attention and after the feed-forward",
    "Houlsby et al., 2019, arXiv 1902.00751",
)(_bottleneck(activation="gelu", initial=0.01))
KINDS.register(
    "pfeiffer", "bottlenecks after the feed-forward", "Pfeiffer et al., 2020, arXiv 2005.00247"
)(_bottleneck())
KINDS.register(
    "parallel",
    "scaled bottlenecks beside the feed-forward",
    "He et al., 2022, arXiv 2110.04366",
)(_bottleneck(reduction_factor=2, scaling=4.0, initial="zero"))
