"""RoSA (Nikdan et al. 2024): sparse and low-rank adapters, saved by a fork of PEFT.

A layer becomes W + S + scaling * B @ A. S stands in compressed sparse rows: `rosa_spa.values`
bfloat16 [nnz], `.row_offs` int32 [out + 1], `.col_idx` int16 [nnz] (and `.row_idx`, an order of
rows that only the kernel needs; `.tr_*`, the same transposed). The factors are `rosa_A.weight`
[r, in] and `rosa_B.weight` [out, r], for embeddings `rosa_embedding_A`, `rosa_embedding_B`. Before
a mask has been made all row offsets are 0, and S is nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array
from deltakit.errors import ConfigError, FormatError
from deltakit.formats.bridges.bridge import BRIDGES, Bridge, Energy, Options, Reading, needed
from deltakit.formats.bridges.csr import flat_of_rows
from deltakit.formats.bridges.foreign_tensors import additive
from deltakit.formats.bridges.names import checkpoint_names
from deltakit.formats.bridges.peft_adapter import (
    Adapter,
    is_adapter,
    open_adapter,
    saved_whole,
    weight_of,
)
from deltakit.formats.bridges.peft_lora import scaling_of
from deltakit.formats.bridges.sparsify import DenseChange, entries_to_keep, sparsified
from deltakit.formats.checkpoint import Checkpoint

_SPARSE = ("rosa_spa.values", "rosa_spa.row_offs", "rosa_spa.col_idx")
_LINEAR = ("rosa_A.weight", "rosa_B.weight")
_EMBEDDING = ("rosa_embedding_A", "rosa_embedding_B")
_FOR_KERNELS = tuple(
    f"rosa_spa.{part}" for part in ("row_idx", "tr_perm", "tr_row_offs", "tr_row_idx", "tr_col_idx")
)
_MARKS = (*_SPARSE, *_LINEAR, *_EMBEDDING, *_FOR_KERNELS)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One adapted module: its sparse part, its factors' keys (None without), and its weight."""

    adapter: Adapter
    name: str  # of the weight in the base
    sparse: TensorDelta
    factors: tuple[str, str] | None
    scaling: float
    transposed: bool

    def change(self) -> Array:
        """S + scaling * B @ A as the weight lies, float32."""
        dense = np.zeros(self.sparse.numel, np.float32)
        dense[self.sparse.indices] = self.sparse.values
        if self.factors is not None:
            a, b = (self.adapter.array(key).astype(np.float32) for key in self.factors)
            product = np.float32(self.scaling) * (b @ a)
            dense += (product.T if self.transposed else product).reshape(-1)
        return dense


@BRIDGES.register("rosa", "RoSA's sparse and low-rank adapters", "Nikdan et al. 2024")
class Rosa(Bridge):
    """A folder with adapter_config.json and adapter_model.safetensors or .bin. Needs the base, for
    the shapes. The sparse part alone is exact; with a low-rank part the largest entries of the sum
    stay, as many as a budget or density says, or the low-rank part is left out (`lossy`)."""

    name = "rosa"
    sparsifies = True

    def recognise(self, path: Path) -> str | None:
        return is_adapter(path, "ROSA", _MARKS, "RoSA adapter")

    def read(self, path: Path, *, base: Checkpoint | None, options: Options) -> Reading:
        checkpoint = needed(base, "a RoSA adapter has no shapes of its weights")
        adapter = open_adapter(path, _MARKS)
        _check_settings(adapter)
        names = checkpoint_names([f"{m}.weight" for m in adapter.modules], base, adapter.saved)
        layers = [
            _layer(adapter, module, keys, names[f"{module}.weight"], checkpoint)
            for module, keys in adapter.modules.items()
        ]
        extras, notes = saved_whole(adapter, names, base)
        tensors, energy, more = _converted(layers, options, checkpoint)
        delta = SparseDelta(tensors=tensors, extras=extras, base=adapter.identity())
        return Reading(delta, (*notes, *more), energy)


def _check_settings(adapter: Adapter) -> None:
    if adapter.config.get("fan_in_fan_out"):
        raise FormatError(
            f"{adapter.folder}: fan_in_fan_out: RoSA gives transposed layers a mask of the wrong "
            "orientation; it cannot be converted"
        )
    if adapter.config.get("init_lora_weights") == "loftq":
        raise FormatError(
            f"{adapter.folder}: init_lora_weights loftq changes the base before training; it "
            "cannot be converted"
        )


def _layer(
    adapter: Adapter, module: str, keys: Mapping[str, str], name: str, base: Checkpoint
) -> _Layer:
    shape, _ = weight_of(module, name, base)
    found = [pair for pair in (_LINEAR, _EMBEDDING) if set(pair) & set(keys)]
    given = {*keys} - {*_FOR_KERNELS}
    if given - {*_SPARSE} != {mark for pair in found for mark in pair} or len(found) > 1:
        raise FormatError(f"module {module!r} has {', '.join(keys)}, which is no RoSA layer")
    if given & {*_SPARSE} not in (set(), {*_SPARSE}):
        raise FormatError(f"module {module!r}: a part of the sparse matrix is missing")
    factors, scaling = None, 1.0
    if found:
        factors = (keys[found[0][0]], keys[found[0][1]])
        a, b = (adapter.file.tensors[key].shape for key in factors)
        ends = (a[1:] + b[:1]) if found == [_EMBEDDING] else (b[:1] + a[1:])
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or ends != shape:
            raise FormatError(
                f"module {module!r}: factors {list(a)} and {list(b)} do not fit {list(shape)}"
            )
        scaling = scaling_of(adapter.config, module, a[0])
    sparse = _sparse(adapter, keys, name, shape, base)
    return _Layer(adapter, name, sparse, factors, scaling, found == [_EMBEDDING])


def _sparse(
    adapter: Adapter, keys: Mapping[str, str], name: str, shape: tuple[int, ...], base: Checkpoint
) -> TensorDelta:
    """The sparse part; of a layer without one, or whose mask was never made, no entries."""
    none = np.zeros(0, np.int64), np.zeros(0, np.float32)
    if _SPARSE[0] not in keys:
        return additive(name, shape, *none, base)
    values, offsets, columns = (adapter.array(keys[mark]) for mark in _SPARSE)
    if not offsets.any():
        return additive(name, shape, *none, base)
    return additive(name, shape, flat_of_rows(name, shape, offsets, columns), values, base)


def _converted(
    layers: list[_Layer], options: Options, base: Checkpoint
) -> tuple[dict[str, TensorDelta], dict[str, Energy], list[str]]:
    """The tensors, the energy of what was made sparse, and notes."""
    asked = options.budget is not None or options.density is not None
    dense = [layer for layer in layers if layer.factors is not None]
    if asked and not dense:
        raise ConfigError(
            "the adapter has no low-rank part and is sparse as it is; convert it whole, then "
            "deltakit truncate the result"
        )
    sparse = {layer.name: layer.sparse for layer in layers if layer.sparse.nnz}
    if not dense:
        return sparse, {}, []
    if not asked and options.lossy:
        return sparse, {}, [f"the low-rank parts of {len(dense)} modules were left out"]
    changes = [
        DenseChange(layer.name, layer.sparse.shape, layer.sparse.dtype, layer.change)
        for layer in sorted(layers, key=lambda layer: layer.name.encode())
    ]
    if not asked:
        raise ConfigError(
            "the adapter has a low-rank part beside the sparse one; say how many entries of their "
            "sum to keep, by a budget (--budget 100k) or a density of the changed tensors "
            "(--density 0.01), or leave the low-rank part out (--lossy)"
        )
    tensors, energy = sparsified(changes, entries_to_keep(changes, options, base))
    return tensors, energy, []
