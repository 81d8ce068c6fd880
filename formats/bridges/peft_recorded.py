"""What PEFT's files have no place for, in the metadata of the ones that deltakit writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltakit.adapter import Adapter
from deltakit.adapters.fold_delta import computed_from
from deltakit.adapters.initial import all_initial_values
from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array
from deltakit.errors import DeltakitError
from deltakit.formats import strict_json
from deltakit.formats.bridges.adapter_entries import entries_beyond, without_entries
from deltakit.formats.checkpoint import Checkpoint

_ADAPTER = "deltakit.adapter"  # JSON: seed, rules and check value of the initial values
_CONFIG = "deltakit.config"  # JSON: changes to config.json


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the metadata of a file say: of the initial values, and changes to config.json."""

    adapter: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def metadata_of(delta: SparseDelta, usual: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file with the values of an adapter delta; nothing of deltakit's where all
    initial values are constant and config changes as a reader expects (`usual`)."""
    adapter = delta.adapter
    found = {"format": "pt"}
    rules = [] if adapter is None else adapter.initial.values()
    how = {how for rule in rules for how in rule}
    if adapter is not None and how & {"uniform", "computed"} and "stored" not in how:
        found[_ADAPTER] = strict_json.dumps(initial_of(adapter))
    if delta.config != usual:
        found[_CONFIG] = strict_json.dumps(dict(delta.config))
    return found


def initial_of(adapter: Adapter) -> dict[str, Any]:
    """What rebuilds an adapter's initial values, as plain JSON."""
    return {"seed": adapter.seed, "initial": dict(adapter.initial), "check": adapter.check}


def recorded(metadata: Mapping[str, str]) -> Recorded:
    """What was written by `metadata_of`; nothing for what is no JSON object."""
    return Recorded(_object(metadata.get(_ADAPTER)), _object(metadata.get(_CONFIG)))


def _object(text: str | None) -> Mapping[str, Any]:
    try:
        content = strict_json.loads((text or "{}").encode(), "metadata")
    except (DeltakitError, UnicodeEncodeError):
        return {}
    return content if isinstance(content, dict) else {}


def from_seed(
    kind: str,
    config: Mapping[str, Any],
    told: Mapping[str, Any],
    values: Mapping[str, Array],
    base: Checkpoint | None,
) -> tuple[Adapter, dict[str, TensorDelta]] | None:
    """The adapter with the initial values that a file records, and its tensors.

    None where it records none, where they are not rebuilt as the check value says (another
    configuration, a base that is not given), and where no differences to them give the values.
    """
    if set(told) != {"seed", "initial", "check"} or not isinstance(told["initial"], dict):
        return None
    try:
        adapter = Adapter(kind=kind, config=config, **told)
        empty = {name: without_entries(name, array) for name, array in values.items()}
        before = SparseDelta(tensors=empty, adapter=adapter)
        initial = all_initial_values(before, computed_from(before, base))
    except (DeltakitError, TypeError):
        return None
    tensors = {name: entries_beyond(name, a, initial[name]) for name, a in values.items()}
    found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return (adapter, found) if len(found) == len(tensors) else None
