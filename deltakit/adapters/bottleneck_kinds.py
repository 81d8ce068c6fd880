"""The bottleneck adapters: where they stand, and their defaults, by the name of the kind."""

from __future__ import annotations

from typing import Any

from deltakit.adapters.kind import Kind

_FIELDS: dict[str, Any] = {
    "bottleneck": None,
    "reduction_factor": 16,
    "activation": "relu",
    "scaling": 1.0,
    "residual": True,
    "initial": 0.02,
}


def _kind(**fields: Any) -> Kind:
    """See `deltakit.adapters.bottleneck_config` for the fields."""
    return Kind(
        builder="deltakit.adapters.bottleneck",
        folds=False,
        fields={**_FIELDS, **fields},
        names={"rank": "bottleneck"},  # He et al. (2022) call it r, too
        target="all-linear",
    )


# Name -> summary, source and kind.
BOTTLENECK_KINDS: dict[str, tuple[str, str, Kind]] = {
    "houlsby": (
        "bottlenecks after attention and after the feed-forward",
        "Houlsby et al., 2019, arXiv 1902.00751",
        _kind(activation="gelu", initial=0.01),
    ),
    "pfeiffer": (
        "bottlenecks after the feed-forward",
        "Pfeiffer et al., 2020, arXiv 2005.00247",
        _kind(),
    ),
    "parallel": (
        "scaled bottlenecks beside the feed-forward",
        "He et al., 2022, arXiv 2110.04366",
        _kind(reduction_factor=2, scaling=4.0, initial="zero"),
    ),
}
