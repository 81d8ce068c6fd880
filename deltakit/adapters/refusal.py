"""Refusing deltas of adapters where entries are taken for changes of the base's own weights."""

from __future__ import annotations

from collections.abc import Iterable

from deltakit.adapter import Adapter
from deltakit.errors import DeltaError

MERGE = "deltakit merge BASE DELTA... --weights W,... adds up the changes that they make to weights"


def refuse_adapters(adapters: Iterable[Adapter | None], what: str, instead: str) -> None:
    """Raise DeltaError, one line, where any of the deltas is of an adapter.

    adapters: of the deltas, None for deltas of base weights. what: is not done with them, such as
    "adding". instead: what works.
    """
    found = next((adapter for adapter in adapters if adapter is not None), None)
    if found is not None:
        raise DeltaError(
            f"{what} is not defined for deltas of adapters ({found.kind!r}), whose entries change "
            f"the adapter's tensors and not the base's; {instead}"
        )


def require_one_adapter(one: Adapter | None, other: Adapter | None) -> None:
    """Raise DeltaError unless both deltas are of base weights, or of the very same adapter."""
    if one == other:
        return
    names = ["base weights" if a is None else f"adapter {a.kind!r}" for a in (one, other)]
    differ = f"one delta is of {names[0]} and the other of {names[1]}"
    if names[0] == names[1]:
        differ = f"both are of {names[0]}, with different seeds, configurations or bases"
    raise DeltaError(f"{differ}, so their entries do not stand at the same weights")
