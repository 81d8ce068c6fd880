"""An adapter in short, told from the header of its delta."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from deltakit.formats.header import SdeltaHeader


def adapter_summary(header: SdeltaHeader) -> dict[str, Any] | None:
    """What a delta's header says of its adapter, as plain JSON; None for one of base weights.

    kind, config, seed, initial, check: as recorded. modules: at which it stands. weights: of all its
    tensors. kept: share of these that are entries. stands_at: fingerprints of the base's tensors.
    """
    if header.adapter is None:
        return None
    weights = sum(tensor.numel for tensor in header.tensors.values())
    known = {} if header.base is None else header.base.tensors
    return {
        **asdict(header.adapter),
        "modules": list(dict.fromkeys(header.adapter.split(name)[0] for name in header.tensors)),
        "weights": weights,
        "kept": header.nnz / weights if weights else 0.0,
        "stands_at": {n: seen.sample for n, seen in known.items() if n not in header.tensors},
    }
