"""Checkpoints for tests: written with plain struct and json, apart from the code under test."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.dtypes import Array, dtype_of


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Array],
    metadata: dict[str, str] | None = None,
    pad: bool = True,
) -> Path:
    """Write `tensors` in the order given; `pad=False` leaves the body unaligned."""
    content: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, array in tensors.items():
        content[name] = {
            "dtype": dtype_of(array).code,
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8) if pad else b" " * (1 - len(text) % 2)
    body = b"".join(array.tobytes() for array in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def write_sharded(folder: Path, shards: list[Mapping[str, Array]], config: Any = None) -> Path:
    """Write a Hugging Face folder with one file per mapping and an index."""
    folder.mkdir()
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    size = sum(a.nbytes for tensors in shards for a in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def read_safetensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> (dtype code, shape, bytes), read with plain struct and json."""
    data = path.read_bytes()
    size = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:size])
    header.pop("__metadata__", None)
    return {
        name: (
            e["dtype"],
            e["shape"],
            data[size + e["data_offsets"][0] : size + e["data_offsets"][1]],
        )
        for name, e in header.items()
    }


def random_array(rng: np.random.Generator, shape: tuple[int, ...], kind: Any) -> Array:
    """Normal floats, or integers from 0 to 99, of the NumPy dtype `kind`."""
    if np.dtype(kind).kind in "iub":
        return np.asarray(rng.integers(0, 100, shape)).astype(kind)
    return np.asarray(rng.standard_normal(shape)).astype(kind)
