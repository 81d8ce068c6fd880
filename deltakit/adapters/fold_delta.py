"""What a delta of an adapter changes in the tensors of its base."""

from __future__ import annotations

import numpy as np

from deltakit.adapter import Adapter
from deltakit.adapters.computed import from_base
from deltakit.adapters.fold import Read, Site, cannot, changes
from deltakit.adapters.fold_products import Change
from deltakit.adapters.initial import Computed, all_initial_values, trained_values
from deltakit.adapters.kinds import KINDS
from deltakit.delta import SparseDelta, in_tensor_order
from deltakit.dtypes import Array
from deltakit.errors import CoordinateError, DeltaError, nearest
from deltakit.formats.checkpoint import Checkpoint

_FACTORS = {  # parameters of adapters that add a product -> its inner and its outer factor
    frozenset(("lora_A.weight", "lora_B.weight")): ("lora_A.weight", "lora_B.weight"),
    frozenset(("lora_A", "lora_B", "lora_E")): ("lora_A", "lora_B"),
}


def changes_of_adapter(delta: SparseDelta, base: Checkpoint, read: Read) -> dict[str, Change]:
    """Tensor of the base -> the change that folding the adapter of `delta` makes, in tensor order.

    read: as in `deltakit.adapters.fold.Site`. Raises DeltaError for an adapter that does not fold,
    CoordinateError for a base without its modules or with other shapes, and BaseMismatchError where
    the check value does not prove its initial values.
    """
    adapter = folding_adapter(delta)
    shapes = {name: info.shape for name, info in base.tensors.items()}
    computed = computed_from(delta, base)
    starts = subtracted_values(delta, computed)
    found: dict[str, Change] = {}
    for module, values in _by_module(delta, trained_values(delta, computed)).items():
        if f"{module}.weight" not in shapes:
            raise CoordinateError(
                f"the adapter stands at {module!r}, and {base.path} has no tensor "
                f"{module + '.weight'!r}{nearest(module + '.weight', base.names)}"
            )
        site = Site(
            kind=adapter.kind,
            config=adapter.config,
            module=module,
            values=values,
            subtracted=starts.get(module, {}),
            shapes=shapes,
            read=read,
        )
        found |= changes(site)
    return in_tensor_order(found)


def products_of_adapter(delta: SparseDelta) -> dict[str, Change]:
    """Module -> the product of thin matrices that is added to its weight, [outputs, inputs], without
    the base.

    Raises DeltaError for adapters that add something else or more, such as DoRA, or do not fold.
    """
    adapter = folding_adapter(delta)
    starts = subtracted_values(delta, None)
    found: dict[str, Change] = {}
    for module, values in _by_module(delta, trained_values(delta)).items():
        factors = _FACTORS.get(frozenset(values))
        if factors is None:
            raise cannot(adapter.kind, f"more than a product is added to {module!r}")
        down, up = (values[name] for name in factors)
        shape = (len(up), down.reshape(len(down), -1).shape[1])
        site = Site(
            kind=adapter.kind,
            config={**adapter.config, "fan_in_fan_out": False},
            module=module,
            values=values,
            subtracted=starts.get(module, {}),
            shapes={f"{module}.weight": shape},
            read=_nothing,
        )
        found[module] = changes(site)[site.weight]
    return found


def folding_adapter(delta: SparseDelta) -> Adapter:
    """The delta's adapter; raises DeltaError for none and for one that does not fold."""
    adapter = delta.adapter
    if adapter is None:
        raise DeltaError("the delta is one of base weights, not of an adapter")
    if not KINDS[adapter.kind].folds:
        folding = ", ".join(record.name for record in KINDS if record.target.folds)
        raise cannot(adapter.kind, f"only those of kind {folding} can")
    return adapter


def subtracted_values(delta: SparseDelta, computed: Computed | None) -> dict[str, dict[str, Array]]:
    """Module -> initial values by which the base was lowered before training; empty for adapters
    that leave it as it is."""
    assert delta.adapter is not None
    if all("stored" not in rule for rule in delta.adapter.initial.values()):
        return {}
    return _by_module(delta, all_initial_values(delta, computed))


def computed_from(delta: SparseDelta, base: Checkpoint | None) -> Computed | None:
    """What gives the initial values that a delta's adapter computes from its base; None without."""
    if base is None or delta.adapter is None:
        return None

    def weight(module: str) -> Array:
        info = base.info(f"{module}.weight")
        return base.read(info.name).view(info.kind.numpy).reshape(info.shape)

    return from_base(delta.adapter, weight)


def _by_module(delta: SparseDelta, values: dict[str, Array]) -> dict[str, dict[str, Array]]:
    """Module -> parameter -> values in float32. Raises DeltaError for values that are not finite."""
    assert delta.adapter is not None
    found: dict[str, dict[str, Array]] = {}
    for name, array in values.items():
        module, parameter = delta.adapter.split(name)
        wide = array.astype(np.float32)
        if not np.isfinite(wide).all():
            raise DeltaError(f"tensor {name!r} of the adapter holds values that are not finite")
        found.setdefault(module, {})[parameter] = wide
    return found


def _nothing(name: str, start: int, stop: int) -> Array:
    raise DeltaError(f"what the adapter changes in {name!r} needs the base")
