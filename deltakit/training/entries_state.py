"""Saving the entries of a run and taking them up again, bit for bit."""

from __future__ import annotations

from typing import Any

import torch

from deltakit.errors import TrainingError
from deltakit.training.entries import Entries
from deltakit.training.resting import Resting


def state_of(entries: Entries) -> dict[str, Any]:
    """Copies of all that the entries are, tensors by name."""
    taken = slice(0, entries.count)
    return {
        "values": entries.values.detach()[taken].clone(),
        "base": entries.base[taken].clone(),
        "order": entries.order[taken].clone(),
        "targets": {t.name: (t.indices + t.start, t.slots.clone()) for t in entries.targets},
        "resting": {t.name: t.resting.state() for t in entries.targets if t.resting},
    }


@torch.no_grad()
def restore_state(entries: Entries, state: dict[str, Any]) -> None:
    """Put entries back as `state_of` found them, live weights included.

    Raises TrainingError when the state belongs to other targets or does not fit the budget.
    """
    if set(state["targets"]) != {t.name for t in entries.targets}:
        raise TrainingError("the saved state trains other tensors than this run")
    if len(state["values"]) > entries.budget:
        raise TrainingError("the saved state holds more entries than this run's budget")
    entries.restore()
    entries.count = len(state["values"])
    entries.reserve(entries.count)
    for name in ("values", "base", "order"):
        place = getattr(entries, name).data
        place.zero_()
        place[: entries.count] = state[name].to(place)
    for target in entries.targets:
        indices, slots = state["targets"][target.name]
        target.indices, here = target.held(indices.to(target.parameter.device))
        if not here.all():
            raise TrainingError(
                f"{target.name}: the saved state has entries of rows that another process holds now; "
                "give SparseTuner.load_state_dict the states of all processes that saved"
            )
        target.slots = slots.to(entries.base.device)
        rest = state["resting"].get(target.name)
        target.resting = rest and Resting(*(array.to(entries.base.device) for array in rest))
    entries.write_through()
    entries.write_resting()
