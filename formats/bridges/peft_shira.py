"""PEFT's SHiRA adapters: rows and columns of entries, and the values added there."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.errors import ConfigError, FormatError
from deltakit.formats.bridges.bridge import BRIDGES, Bridge, Options, Reading, needed
from deltakit.formats.bridges.entries import flattened, in_order
from deltakit.formats.bridges.names import checkpoint_names
from deltakit.formats.bridges.peft_adapter import (
    Adapter,
    is_adapter,
    open_adapter,
    saved_whole,
    weight_of,
)
from deltakit.formats.bridges.peft_writer import (
    filled,
    filling_note,
    linear_weights,
    without_filling,
    write_adapter,
)
from deltakit.formats.checkpoint import Checkpoint

_MARKS = ("shira_weight", "shira_indices")


@BRIDGES.register("peft-shira", "PEFT's SHiRA adapters", "Bhardwaj et al., 2024; PEFT 0.17")
class PeftShira(Bridge):
    """A folder with `<module>.shira_weight` float [nnz] and `<module>.shira_indices` int32
    [2, nnz] (rows, columns). W becomes W + v, added in float32 and rounded once, as deltakit does.

    The file has no shapes, so reading needs the base. PEFT demands r * (in + out) entries of every
    layer, with one r for all.
    """

    name = "peft-shira"
    writes = "add"

    def recognise(self, path: Path) -> str | None:
        return is_adapter(path, "SHIRA", _MARKS, "PEFT SHiRA adapter")

    def read(self, path: Path, *, base: Checkpoint | None, options: Options) -> Reading:
        checkpoint = needed(base, "a SHiRA adapter has no shapes of its weights")
        adapter = open_adapter(path, _MARKS)
        weights = [f"{module}.weight" for module in adapter.modules]
        names = checkpoint_names(weights, checkpoint, adapter.saved)
        tensors = {
            (name := names[f"{module}.weight"]): _tensor(adapter, module, name, checkpoint)
            for module in adapter.modules
        }
        extras, notes = saved_whole(adapter, names, checkpoint)
        return Reading(
            SparseDelta(tensors=tensors, extras=extras, base=adapter.identity()), tuple(notes)
        )

    def write(
        self, delta: SparseDelta, path: Path, *, base: Checkpoint | None, options: Options
    ) -> tuple[str, ...]:
        modules, notes = linear_weights(delta, base, options, "SHiRA")
        rank = max(-(-t.nnz // sum(t.shape)) for t in modules.values())
        counts = {module: rank * sum(t.shape) for module, t in modules.items()}
        for module, tensor in modules.items():
            if counts[module] > tensor.numel:
                raise ConfigError(
                    f"SHiRA wants r * (in + out) entries of every layer; the r = {rank} that the "
                    f"fullest layer needs is too much for {module!r} {list(tensor.shape)}; write "
                    "peft-supertuning instead"
                )
        arrays = {}
        for module, tensor in modules.items():
            flat, added = filled(tensor, counts[module])
            rows_columns = np.stack(np.divmod(flat, tensor.shape[1])).astype(np.int32)
            arrays[f"{module}.shira_weight"] = added
            arrays[f"{module}.shira_indices"] = rows_columns
        config = {"peft_type": "SHIRA", "r": rank, "mask_type": "random", "random_seed": None}
        write_adapter(path, config, arrays, delta, modules, base, options)
        return (*notes, *filling_note(modules, counts))


def _tensor(adapter: Adapter, module: str, name: str, base: Checkpoint) -> TensorDelta:
    keys = adapter.modules[module]
    if set(keys) != set(_MARKS):
        raise FormatError(
            f"module {module!r} has {', '.join(keys)}; expected {' and '.join(_MARKS)}"
        )
    shape, kind = weight_of(module, name, base)
    coordinates, values = (adapter.array(keys[mark]) for mark in reversed(_MARKS))
    flat = flattened(name, shape, coordinates)
    if values.shape != flat.shape:
        raise FormatError(
            f"module {module!r} has {values.size} values for {flat.size} indices; the adapter is "
            "broken"
        )
    count = without_filling(adapter, module, len(flat))
    indices, values = in_order(name, shape, flat[:count], values[:count])
    return TensorDelta(
        name=name,
        shape=shape,
        dtype=kind.name,
        mode="add",
        indices=indices,
        values=values,
    )
