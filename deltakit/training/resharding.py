"""Taking up a saved run with another number of processes than it was saved by.

Each process of a sharded run saves the state of its own entries, with their places in whole
tensors. Together these states say everything, so any number of processes can share them anew;
nothing is summed or rounded on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deltakit.training.engine import Engine
from deltakit.training.entries import Entries
from deltakit.training.extra import ShardExtra

State = dict[str, Any]


def resharded(states: Sequence[State], engine: Engine) -> State:
    """This process's part of the states (`SparseTuner.state_dict`) of all that saved, by rank.

    engine: of the run that goes on; it is only asked what it holds.
    """
    whole = _joined(states)
    sparse, entries = whole["sparse"], engine.entries
    rows, targets = _own(sparse, entries)
    (first,) = whole["param_groups"][0]["params"]
    sparse |= {name: sparse[name][rows] for name in ("values", "base", "order")}
    sparse["targets"] = targets
    entries.reserve(len(rows))
    moments = whole["state"]
    if first in moments:
        moments[first] = {n: _places(t, rows, entries) for n, t in moments[first].items()}
    names = [extra.name for extra in engine.extras]
    for extra in engine.extras:
        if isinstance(extra, ShardExtra):
            master, updates = sparse["extras"][extra.name]
            sparse["extras"][extra.name] = _rows(master, extra), updates
            key = whole["param_groups"][1]["params"][names.index(extra.name)]
            if key in moments:
                moments[key] = {n: _rows(t, extra) for n, t in moments[key].items()}
    return whole


def _joined(states: Sequence[State]) -> State:
    """The states of all processes as one: entries and the rows of extras by rank."""
    sparse = [state["sparse"] for state in states]
    counts = [len(part["values"]) for part in sparse]
    starts = [sum(counts[:rank]) for rank in range(len(counts))]
    targets = {
        name: (
            torch.cat([part["targets"][name][0] for part in sparse]),
            torch.cat([p["targets"][name][1] + s for p, s in zip(sparse, starts, strict=True)]),
        )
        for name in sparse[0]["targets"]
    }
    together = {
        **sparse[0],
        **{n: torch.cat([part[n] for part in sparse]) for n in ("values", "base", "order")},
        "targets": targets,
        "extras": {
            name: (torch.cat([part["extras"][name][0] for part in sparse]), updates)
            for name, (_, updates) in sparse[0]["extras"].items()
        },
    }
    first = states[0]["param_groups"][0]["params"][0]
    moments = {}
    for key, names in states[0]["state"].items():
        used = counts if key == first else None
        moments[key] = {n: _cat([state["state"][key][n] for state in states], used) for n in names}
    return {**states[0], "sparse": together, "state": moments}


def _cat(tensors: Sequence[Any], counts: Sequence[int] | None) -> Any:
    """A number that all have alike, or vectors in a row, of which so many places are in use."""
    if not torch.is_tensor(tensors[0]) or tensors[0].ndim == 0:
        return tensors[0]
    if counts is not None:
        tensors = [tensor[:count] for tensor, count in zip(tensors, counts, strict=True)]
    return torch.cat(list(tensors))


def _own(
    sparse: State, entries: Entries
) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The places of all processes' entries that are held here, in order, and per tensor the flat
    indices and new places of these."""
    mine = {}
    for target in entries.targets:
        indices, slots = sparse["targets"][target.name]
        here = target.held(indices.to(target.parameter.device))[1].cpu()
        mine[target.name] = indices[here], slots[here]
    rows = torch.cat([slots for _, slots in mine.values()]).sort().values
    places = {n: (i, torch.searchsorted(rows, slots)) for n, (i, slots) in mine.items()}
    return rows, places


def _places(value: Any, rows: torch.Tensor, entries: Entries) -> Any:
    """Some of an optimizer's numbers per entry, in as many places as this run has."""
    if not torch.is_tensor(value) or value.ndim == 0:
        return value
    found = value.new_zeros(len(entries.values))
    found[: len(rows)] = value[rows]
    return found


def _rows(value: Any, extra: ShardExtra) -> Any:
    """The rows of a whole extra that are held here."""
    if not torch.is_tensor(value) or value.ndim == 0:
        return value
    stop = extra.start + extra.master.numel()
    return value.reshape(-1)[extra.start : stop].reshape(extra.master.shape)
