"""PEFT's Super-Tuning adapters: flat indices of the largest weights, and the values added there."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array
from deltakit.errors import BaseMismatchError, ConfigError, FormatError
from deltakit.formats.bridges.bridge import BRIDGES, Bridge, Options, Reading, needed
from deltakit.formats.bridges.entries import in_order
from deltakit.formats.bridges.names import checkpoint_names
from deltakit.formats.bridges.peft_adapter import (
    Adapter,
    is_adapter,
    open_adapter,
    saved_whole,
    weight_of,
)
from deltakit.formats.bridges.peft_rounding import all_fitted, rounded, rounding_note
from deltakit.formats.bridges.peft_supra import FACTORS, with_factors
from deltakit.formats.bridges.peft_writer import (
    filled,
    filling_note,
    linear_weights,
    without_filling,
    write_adapter,
)
from deltakit.formats.checkpoint import Checkpoint

_VALUES, _INDICES = "supertuning_values", "supertuning_indices"
_MARKS = (_VALUES, _INDICES, *FACTORS)


@BRIDGES.register(
    "peft-supertuning", "PEFT's Super-Tuning adapters", "arXiv 2607.09287, 2026; PEFT 0.21"
)
class PeftSupertuning(Bridge):
    """A folder with `<module>.supertuning_values` float [k] and `<module>.supertuning_indices`
    int32 [k] flat, in falling order of |W|. W becomes W + v, v cast to W's dtype first.

    Saved without indices, the support is computed from the base as PEFT does it; equal magnitudes
    in it make that ambiguous, and are refused. PEFT demands int(numel * (1 - sparsity)) entries of
    every layer, with one sparsity for all. Of the hybrid Supra, W + v + alpha / r * B @ A, the
    largest entries stay.
    """

    name = "peft-supertuning"
    writes = "add"
    sparsifies = True  # the hybrid with low-rank factors

    def recognise(self, path: Path) -> str | None:
        return is_adapter(path, "SUPERTUNING", _MARKS, "PEFT Super-Tuning adapter")

    def read(self, path: Path, *, base: Checkpoint | None, options: Options) -> Reading:
        checkpoint = needed(base, "a Super-Tuning adapter has no shapes of its weights")
        adapter = open_adapter(path, _MARKS)
        weights = [f"{module}.weight" for module in adapter.modules]
        names = checkpoint_names(weights, checkpoint, adapter.saved)
        entries = {
            module: _tensor(adapter, module, names[f"{module}.weight"], checkpoint)
            for module in adapter.modules
        }
        tensors, energy, told = with_factors(adapter, entries, options, checkpoint)
        extras, notes = saved_whole(adapter, names, checkpoint)
        notes += told
        if any(_INDICES not in keys for keys in adapter.modules.values()):
            notes.append("no indices were saved; they are computed from the base's weights")
        notes += rounding_note({name: tensor.kind for name, tensor in tensors.items()})
        delta = SparseDelta(tensors=tensors, extras=extras, base=adapter.identity())
        return Reading(delta, tuple(notes), energy)

    def write(
        self, delta: SparseDelta, path: Path, *, base: Checkpoint | None, options: Options
    ) -> tuple[str, ...]:
        modules, notes = linear_weights(delta, base, options, "Super-Tuning")
        large = [module for module, tensor in modules.items() if tensor.numel > 2**31]
        if large:
            raise ConfigError(f"{large[0]!r} has more than 2^31 weights, beyond PEFT's int32")
        sparsity = _sparsity(list(modules.values()))
        counts = {module: _count(t.numel, sparsity) for module, t in modules.items()}
        values, more = all_fitted(modules, base)
        arrays = {}
        for module, tensor in modules.items():
            flat, added = filled(tensor, counts[module], values[module])
            arrays[f"{module}.{_VALUES}"] = added
            arrays[f"{module}.{_INDICES}"] = flat.astype(np.int32)
        config = {
            "peft_type": "SUPERTUNING",
            "sparsity": sparsity,
            "select_top": True,
            "r": None,
            "save_precomputed_indices": True,
        }
        write_adapter(path, config, arrays, delta, modules, base, options)
        return (*notes, *more, *filling_note(modules, counts))


def _count(numel: int, sparsity: float) -> int:
    """Entries of a layer, in PEFT's own arithmetic."""
    return int(numel * (1 - sparsity))


def _sparsity(tensors: list[TensorDelta]) -> float:
    """The highest sparsity that leaves every layer room for its entries."""
    sparsity = 1 - max(tensor.nnz / tensor.numel for tensor in tensors)
    while any(_count(tensor.numel, sparsity) < tensor.nnz for tensor in tensors):
        sparsity = math.nextafter(sparsity, -1)
    return max(sparsity, 0.0)


def _tensor(adapter: Adapter, module: str, name: str, base: Checkpoint) -> TensorDelta:
    keys = adapter.modules[module]
    shape, kind = weight_of(module, name, base)
    values = adapter.array(keys[_VALUES]) if _VALUES in keys else np.zeros(())
    if values.ndim != 1:
        raise FormatError(f"module {module!r} has no {_VALUES} [k]; the adapter is broken")
    if _INDICES in keys:
        flat = adapter.array(keys[_INDICES])
        count = without_filling(adapter, module, len(values))
        flat, values = flat[:count] if flat.shape == values.shape else flat, values[:count]
    else:
        flat = _recomputed(adapter, name, base, values)
    indices, values = in_order(name, shape, flat, values)
    return TensorDelta(
        name=name,
        shape=shape,
        dtype=kind.name,
        mode="add",
        indices=indices,
        values=rounded(values, kind),
    )


def _recomputed(adapter: Adapter, name: str, base: Checkpoint, values: Array) -> Array:
    """The support as PEFT computes it on loading, int64 [k] in the order of the values."""
    info = base.info(name)
    config = adapter.config
    sparsity, top = config.get("sparsity"), config.get("select_top", True)
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise FormatError(f"{adapter.folder}: the config has no sparsity to compute supports from")
    count = len(values)
    if count != _count(info.numel, sparsity):
        raise BaseMismatchError(
            f"tensor {name!r}: {count} values, but sparsity {sparsity} of {info.numel} weights "
            f"gives {_count(info.numel, sparsity)}; is this the base that the adapter was made of?"
        )
    size = np.abs(base.read(name).view(info.kind.numpy).astype(info.kind.compute))
    ranked = -size if top else size
    nearest = np.argpartition(ranked, min(count, info.numel - 1))[: count + 1]
    order = nearest[np.argsort(ranked[nearest], kind="stable")]
    ties = np.flatnonzero(ranked[order[1:]] == ranked[order[:-1]])
    if ties.size:
        raise FormatError(
            f"tensor {name!r}: the adapter was saved without indices, and {ties.size} of the "
            f"{count} weights that it changes equal another in size, so PEFT's choice among them "
            "is not known; save the adapter with save_precomputed_indices=True"
        )
    return order[:count]
