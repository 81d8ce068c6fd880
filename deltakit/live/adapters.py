"""Adapters of deltas in live models: modules that come and go, beside weights that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deltakit.adapters.attach import Attached, reattach
from deltakit.adapters.kinds import kind_of
from deltakit.delta import SparseDelta
from deltakit.errors import ConfigError
from deltakit.formats.checkpoint import Checkpoint

if TYPE_CHECKING:
    from deltakit.live.ledger import Applied

Weighed = tuple["LiveAdapter", float]  # an adapter and its weight


@dataclass(eq=False)
class LiveAdapter:
    """The adapter of a delta, which can stand in a model.

    modules: the names of those at which it stands, as they are without adapters.
    """

    model: torch.nn.Module
    delta: SparseDelta
    modules: Sequence[str]
    checkpoint: Checkpoint | None
    attached: Attached | None = None

    def enter(self, weight: float) -> None:
        """Put it into the model; what requires gradients stays as it is."""
        before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        found = reattach(self.model, self.delta, base=self.checkpoint)
        for parameter in found.parameters.values():
            parameter.requires_grad = False
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        self.attached = found
        self.weigh(weight)

    def weigh(self, weight: float) -> None:
        """Let it count for more or less."""
        if self.attached is not None:
            self.attached.weigh(weight)

    def leave(self) -> None:
        """Take it out of the model."""
        if self.attached is not None:
            self.attached.detach()
            self.attached = None


def check_beside_entries(applied: Sequence[Applied]) -> None:
    """Raise ConfigError for adapters that rescale weights in which other deltas have entries.

    Merging lets an adapter rescale the base alone; beside entries it would rescale those as well.
    """
    touched = {name.rpartition(".")[0] for each in applied for name in each.tensors}
    for each in applied:
        if each.adapter is None or each.delta.adapter is None:
            continue
        kind = each.delta.adapter.kind
        shared = [module for module in each.adapter.modules if module in touched]
        if shared and kind_of(kind).folds and not kind_of(kind).family:
            raise ConfigError(
                f"adapter {kind!r} cannot stand at {shared[0]!r}, in whose weights another delta has "
                "entries: it would rescale those too, which merging does not; apply one alone"
            )


def exchange(old: Sequence[Weighed], new: Sequence[Weighed]) -> None:
    """Let the adapters of `new` stand in the model in that order, instead of those of `old`.

    Adapters after the first that differs are put in anew, so that sums have the order of `new`
    whatever came before. After a failure those of `old` stand again.
    """
    pairs = zip(old, new, strict=False)
    same = next((n for n, (a, b) in enumerate(pairs) if a[0] is not b[0]), min(len(old), len(new)))
    try:
        _become(old[same:], new[same:])
        for adapter, weight in new[:same]:
            adapter.weigh(weight)
    except BaseException:
        _become(new[same:], old[same:])
        for adapter, weight in old[:same]:
            adapter.weigh(weight)
        raise


def _become(old: Sequence[Weighed], new: Sequence[Weighed]) -> None:
    for adapter, _ in reversed(old):
        adapter.leave()
    for adapter, weight in new:
        adapter.enter(weight)
