"""What a delta of an adapter changes in the tensors of its base."""

from __future__ import annotations

import numpy as np

from deltakit.adapters.computed import from_base
from deltakit.adapters.fold import Read, Site, cannot, changes
from deltakit.adapters.fold_products import Change
from deltakit.adapters.initial import Computed, all_initial_values, trained_values
from deltakit.adapters.kinds import KINDS
from deltakit.delta import SparseDelta, in_tensor_order
from deltakit.dtypes import Array
from deltakit.errors import CoordinateError, DeltaError, nearest
from deltakit.formats.checkpoint import Checkpoint


def changes_of_adapter(delta: SparseDelta, base: Checkpoint, read: Read) -> dict[str, Change]:
    """Tensor of the base -> the change that folding the adapter of `delta` makes, in tensor order.

    read: as in `deltakit.adapters.fold.Site`. Raises DeltaError for an adapter that does not fold,
    CoordinateError for a base without its modules or with other shapes, and BaseMismatchError where
    the check value does not prove its initial values.
    """
    adapter = delta.adapter
    if adapter is None:
        raise DeltaError("the delta is one of base weights, not of an adapter")
    if not KINDS[adapter.kind].folds:
        raise cannot(adapter.kind, "what it does is no change of a weight")
    shapes = {name: info.shape for name, info in base.tensors.items()}
    computed = computed_from(delta, base)
    trained = _by_module(delta, trained_values(delta, computed))
    starts = {}
    if any("stored" in rule for rule in adapter.initial.values()):
        starts = _by_module(delta, all_initial_values(delta, computed))
    found: dict[str, Change] = {}
    for module, values in trained.items():
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
