"""Patches for vLLM's checkpoint weight loader: new weights at flat indices, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.errors import ConfigError, DeltakitError, FormatError
from deltakit.formats import strict_json
from deltakit.formats.atomic_folder import replacing_folder
from deltakit.formats.bridges.bridge import BRIDGES, Bridge, Options, Reading
from deltakit.formats.bridges.coo_safetensors import (
    INDICES,
    VALUES,
    CooSafetensors,
    encode,
    lost,
    typed_values,
)
from deltakit.formats.checkpoint import Checkpoint

MANIFEST, PATCHES = "manifest.json", "patches.safetensors"
_FORMAT = "vllm.CheckpointWeightPatch"
_MAX_MANIFEST = 100_000_000  # bytes


@BRIDGES.register("vllm-patch", "patches for vLLM's CheckpointWeightPatch", "vLLM PR 50723, 2026")
class VllmPatch(Bridge):
    """A folder of `patches.safetensors` (COO: `{name}.indices`, `{name}.values`) and
    `manifest.json`, whose rows name the fields of a CheckpointWeightPatch: name, shape, dtype, and
    the tensors that hold values and indices.

    Values are new weights in the checkpoint's dtype, indices int32 or int64, sorted. vLLM takes
    floats without NaN only, and keeps NaN for "unchanged".
    """

    name = "vllm-patch"
    writes = "set"

    def recognise(self, path: Path) -> str | None:
        try:
            return f"vLLM checkpoint patches, {len(_manifest(path))} tensors"
        except (DeltakitError, OSError):
            return None

    def read(self, path: Path, *, base: Checkpoint | None, options: Options) -> Reading:
        reading = CooSafetensors().read(path / PATCHES, base=base, options=options)
        rows = [_row(tensor) for tensor in reading.delta.tensors.values()]
        if rows != _manifest(path):
            raise FormatError(f"{path}: {MANIFEST} and {PATCHES} tell of different tensors")
        return reading

    def write(
        self, delta: SparseDelta, path: Path, *, base: Checkpoint | None, options: Options
    ) -> tuple[str, ...]:
        notes = lost(delta)
        if delta.extras:
            if not options.lossy:
                raise ConfigError(
                    f"vLLM takes patches of the base's tensors; {len(delta.extras)} extras (such "
                    f"as {next(iter(delta.extras))!r}) are none; --lossy leaves them out"
                )
            notes.append(f"{len(delta.extras)} extras are left out")
        for tensor in delta.tensors.values():
            check_patch(tensor)
        rows = [_row(tensor) for tensor in delta.tensors.values()]
        manifest = {"format": _FORMAT, "version": 1, "patches": rows}
        with replacing_folder(path) as folder:
            patches = encode(SparseDelta(tensors=delta.tensors))
            (folder / PATCHES).write_bytes(patches)
            (folder / MANIFEST).write_text(strict_json.dumps(manifest) + "\n", encoding="utf-8")
        return tuple(notes)


def check_patch(tensor: TensorDelta) -> None:
    """Raise ConfigError for a `set` tensor that vLLM does not take."""
    if not tensor.kind.is_floating:
        raise ConfigError(f"tensor {tensor.name!r} is {tensor.dtype}; vLLM patches floats only")
    if np.isnan(typed_values(tensor).astype(np.float64)).any():
        raise ConfigError(
            f"tensor {tensor.name!r} sets NaN, which means an unchanged weight in a vLLM patch"
        )


def _row(tensor: TensorDelta) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "values": tensor.name + VALUES,
        "indices": tensor.name + INDICES,
    }


def _manifest(path: Path) -> list[Any]:
    file = path / MANIFEST
    if not file.is_file() or file.stat().st_size > _MAX_MANIFEST:
        raise FormatError(f"{path} holds no readable {MANIFEST}")
    content = strict_json.loads(file.read_bytes(), str(file))
    rows = content.get("patches") if isinstance(content, dict) else None
    if (
        not isinstance(rows, list)
        or content.get("format") != _FORMAT
        or content.get("version") != 1
    ):
        raise FormatError(f"{file} is no manifest of {_FORMAT}, version 1")
    return rows
