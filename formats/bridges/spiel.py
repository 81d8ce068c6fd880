"""SpIEL (Ansell et al. 2024): sparse deltas saved by a fork of PEFT 0.6 as adapters of type SFT.

Per linear layer `<module>.sft_delta.values` float [k], which add, and `<module>.sft_delta.indices`
int32 or int64 [k], flat and row-major, in any order (entries are dropped and grown in place).
"""

from __future__ import annotations

from pathlib import Path

from deltakit.delta import SparseDelta
from deltakit.errors import FormatError
from deltakit.formats.bridges.bridge import BRIDGES, Bridge, Options, Reading, needed
from deltakit.formats.bridges.foreign_tensors import additive
from deltakit.formats.bridges.names import checkpoint_names
from deltakit.formats.bridges.peft_adapter import (
    is_adapter,
    open_adapter,
    saved_whole,
    weight_of,
)
from deltakit.formats.checkpoint import Checkpoint

_VALUES, _INDICES = "sft_delta.values", "sft_delta.indices"
_MARKS = (_VALUES, _INDICES)


@BRIDGES.register("spiel", "SpIEL's adapters (PEFT type SFT)", "Ansell et al. 2024")
class Spiel(Bridge):
    """A folder with adapter_config.json and adapter_model.safetensors or .bin. Needs the base,
    for the shapes. W becomes W + v, v cast to W's dtype first, as SpIEL merges."""

    name = "spiel"

    def recognise(self, path: Path) -> str | None:
        return is_adapter(path, "SFT", _MARKS, "SpIEL adapter")

    def read(self, path: Path, *, base: Checkpoint | None, options: Options) -> Reading:
        checkpoint = needed(base, "a SpIEL adapter has no shapes of its weights")
        adapter = open_adapter(path, _MARKS)
        names = checkpoint_names([f"{m}.weight" for m in adapter.modules], base, adapter.saved)
        tensors = {}
        for module, keys in adapter.modules.items():
            if set(keys) != set(_MARKS):
                raise FormatError(f"module {module!r} has {', '.join(keys)} alone")
            name = names[f"{module}.weight"]
            shape, _ = weight_of(module, name, checkpoint)
            indices, values = adapter.array(keys[_INDICES]), adapter.array(keys[_VALUES])
            tensors[name] = additive(name, shape, indices, values, checkpoint, rounded=True)
        extras, notes = saved_whole(adapter, names, base)
        narrow = sorted({t.dtype for t in tensors.values()} - {"float32", "float64"})
        if narrow:
            notes.append(f"values are rounded to {' and '.join(narrow)}, as SpIEL merges them")
        delta = SparseDelta(tensors=tensors, extras=extras, base=adapter.identity())
        return Reading(delta, tuple(notes))
