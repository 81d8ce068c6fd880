"""Supra, the hybrid of Super-Tuning: entries and low-rank factors whose sum is made sparse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deltakit.delta import TensorDelta
from deltakit.dtypes import Array
from deltakit.errors import ConfigError, FormatError
from deltakit.formats.bridges.bridge import Energy, Options
from deltakit.formats.bridges.peft_adapter import Adapter
from deltakit.formats.bridges.peft_lora import scaling_of
from deltakit.formats.bridges.sparsify import DenseChange, entries_to_keep, sparsified
from deltakit.formats.checkpoint import Checkpoint

FACTORS = ("supertuning_lora_A.weight", "supertuning_lora_B.weight")


@dataclass(frozen=True, slots=True)
class _Sum:
    """A layer's entries, the keys of its factors A [r, in] and B [out, r], and their scaling."""

    adapter: Adapter
    sparse: TensorDelta
    a: str
    b: str
    scaling: float

    def change(self) -> Array:
        """Entries + scaling * B @ A, float32 [out, in]."""
        a, b = (self.adapter.array(key).astype(np.float32) for key in (self.a, self.b))
        product = np.ascontiguousarray(b @ a)
        product *= np.float32(self.scaling)
        product.reshape(-1)[self.sparse.indices] += self.sparse.values
        return product


def with_factors(
    adapter: Adapter, entries: Mapping[str, TensorDelta], options: Options, base: Checkpoint
) -> tuple[dict[str, TensorDelta], Mapping[str, Energy], list[str]]:
    """The tensors of an adapter, the energy of what was made sparse, and notes.

    entries: module -> its sparse part. Where there are factors, the largest entries of the sums
    stay, or the factors are left out (`options.lossy`). Raises ConfigError where neither a budget
    nor that is asked for, and where a budget is asked for and there are no factors.
    """
    tensors = {tensor.name: tensor for tensor in entries.values()}
    asked = options.budget is not None or options.density is not None
    if not any(set(keys) & set(FACTORS) for keys in adapter.modules.values()):
        if asked:
            raise ConfigError(
                "the adapter has no low-rank part and is sparse as it is; convert it whole, then "
                "deltakit truncate the result"
            )
        return tensors, {}, []
    if not asked and options.lossy:
        return tensors, {}, [f"the low-rank parts of {len(entries)} modules are left out"]
    if not asked:
        raise ConfigError(
            "the adapter has a low-rank part beside its entries (Supra); say how many entries of "
            "their sum to keep, by a budget (--budget 100k) or a density of the changed tensors "
            "(--density 0.01), or leave the low-rank part out (--lossy)"
        )
    sums = [_sum(adapter, module, tensor) for module, tensor in entries.items()]
    changes = [
        DenseChange(s.sparse.name, s.sparse.shape, s.sparse.dtype, s.change)
        for s in sorted(sums, key=lambda s: s.sparse.name.encode())
    ]
    kept, energy = sparsified(changes, entries_to_keep(changes, options, base))
    return kept, energy, []


def _sum(adapter: Adapter, module: str, sparse: TensorDelta) -> _Sum:
    keys = adapter.modules[module]
    if not set(FACTORS) <= set(keys):
        raise FormatError(f"module {module!r} has {', '.join(keys)}, which is no pair of factors")
    a, b = (adapter.file.tensors[keys[mark]].shape for mark in FACTORS)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != sparse.shape:
        raise FormatError(
            f"module {module!r}: factors {list(a)} and {list(b)} do not fit {list(sparse.shape)}"
        )
    scaling = scaling_of(adapter.config, module, a[0])
    return _Sum(adapter, sparse, keys[FACTORS[0]], keys[FACTORS[1]], scaling)
