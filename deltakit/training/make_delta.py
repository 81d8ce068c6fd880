"""From a run's engine to the delta that it has trained so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltakit.delta import SparseDelta
from deltakit.live.arrays import to_numpy
from deltakit.live.coordinates import Coordinates
from deltakit.parallel.shards import Shards, whole
from deltakit.training.adapted import AdapterTraining
from deltakit.training.collect import collect
from deltakit.training.engine import Engine
from deltakit.training.live_identity import LiveIdentity


@dataclass(frozen=True)
class Record:
    """What a run's delta tells beside entries: where they belong and how they came to be."""

    where: Coordinates
    identity: LiveIdentity
    adapter: AdapterTraining | None
    budget: int
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]


def make_delta(
    engine: Engine, record: Record, shards: Shards | None = None, *, everywhere: bool = True
) -> SparseDelta | None:
    """The delta in checkpoint coordinates.

    shards: of a sharded model; all processes must call together, and all get the whole delta, or
    the first alone where it is not wanted `everywhere`.
    """
    engine.clipping.check()
    tensors, base = collect(
        engine.entries,
        record.where,
        ordered=engine.selector is not None,
        frozen=engine.frozen,
        shards=shards,
        everywhere=everywhere,
    )
    extras = {e.name: to_numpy(whole(e.parameter)) for e in engine.extras}
    if shards is not None and shards.ranks.rank and not everywhere:
        return None
    extras |= {n: to_numpy(buffer) for n, buffer in engine.changed_buffers().items()}
    identity = record.identity.of(base, tensors)
    if record.adapter:
        tensors, identity = record.adapter.whole(tensors), record.adapter.base(identity)
        extras |= record.adapter.extras
    reached = sum(tensor.nnz for tensor in tensors.values())
    return SparseDelta(
        tensors=tensors,
        extras=extras,
        base=identity,
        config=record.config,
        provenance={**record.provenance, "budget": record.budget, "reached": reached},
        adapter=record.adapter.adapter if record.adapter else None,
    )
