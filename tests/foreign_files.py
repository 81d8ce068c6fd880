"""Files as other sparse fine-tuning projects write them, made from their documented layouts."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Entries = tuple[torch.Tensor, torch.Tensor]  # flat row-major indices int64 [nnz], values [nnz]


def random_entries(
    shape: Sequence[int], count: int, seed: int, dtype: torch.dtype = torch.float32
) -> Entries:
    """`count` entries of a tensor of `shape`, in an order of their own."""
    generator = torch.Generator().manual_seed(seed)
    numel = int(np.prod(shape))
    indices = torch.randperm(numel, generator=generator)[:count]
    return indices, torch.randn(count, generator=generator).to(dtype)


def dense(shape: Sequence[int], entries: Entries) -> torch.Tensor:
    """The entries as a dense tensor of their own dtype."""
    flat = torch.zeros(int(np.prod(shape)), dtype=entries[1].dtype)
    flat[entries[0]] = entries[1]
    return flat.reshape(*shape)


# LT-SFT (composable-sft): column-major steps, the first of them a NumPy integer.


def lt_sft_encoding(change: torch.Tensor) -> dict[str, Any]:
    """The dense change of a parameter as LT-SFT saves it since October 2021."""
    coordinates = np.stack([axis.numpy() for axis in change.nonzero(as_tuple=True)])
    multipliers = np.cumprod([1, *change.shape[:-1]], dtype=np.int64)
    flat = multipliers @ coordinates
    order = np.argsort(flat)
    steps = np.diff(flat[order]).tolist()
    return {
        "size": change.size(),
        "index_steps": [flat[order][0], *steps] if flat.size else [],
        "values": change[change.nonzero(as_tuple=True)][torch.from_numpy(order)],
    }


def earliest_encoding(change: torch.Tensor) -> dict[str, Any]:
    """The same as saved in September 2021: plain lists of coordinates."""
    sparse = change.to_sparse().coalesce()
    return {
        "size": change.size(),
        "indices": sparse.indices().tolist(),
        "values": sparse.values().tolist(),
    }


class SparseTensorDifference:
    """What composable-sft's class of that name leaves in a pickle."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.__dict__.update(fields)


SparseTensorDifference.__module__ = "sft.sft"


def save_as(path: Path, content: Any, stand_in: type | None = None) -> Path:
    """torch.save, with `stand_in` importable under its pretended module for as long as it takes."""
    if stand_in is None:
        torch.save(content, path)
        return path
    import sys
    from types import ModuleType

    module = ModuleType(stand_in.__module__)
    setattr(module, stand_in.__name__, stand_in)
    parts = stand_in.__module__.split(".")
    names = [".".join(parts[: n + 1]) for n in range(len(parts))]
    before = {name: sys.modules.get(name) for name in names}
    try:
        sys.modules.update(dict.fromkeys(names, module))
        torch.save(content, path)
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
    return path


# SpIEL and RoSA: adapters of forks of PEFT.


def write_adapter(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    pickled: bool = False,
) -> Path:
    """An adapter's folder; PEFT before 0.7 saved adapter_model.bin."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    if pickled:
        torch.save(named, folder / "adapter_model.bin")
    else:
        save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def csr(shape: Sequence[int], entries: Entries) -> tuple[torch.Tensor, ...]:
    """Values [nnz], row offsets int32, columns int16 and rows by falling length int16."""
    order = entries[0].argsort()
    flat, values = entries[0][order], entries[1][order]
    counts = torch.bincount(flat // shape[1], minlength=shape[0])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    columns = (flat % shape[1]).to(torch.int16)
    return values, offsets, columns, counts.argsort(descending=True).to(torch.int16)


def rosa_layer(module: str, shape: Sequence[int], entries: Entries) -> dict[str, torch.Tensor]:
    """The sparse part of a RoSA layer, as the default implementation saves it."""
    parts = zip(("values", "row_offs", "col_idx", "row_idx"), csr(shape, entries), strict=True)
    return {f"{module}.rosa_spa.{part}": tensor for part, tensor in parts}


def random_masking_state(
    state: Mapping[str, torch.Tensor], masked: Mapping[str, Entries]
) -> OrderedDict[str, torch.Tensor]:
    """A model's state dict with the linear layers in `masked` wrapped as Random Masking does."""
    wrapped: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        if module not in masked:
            wrapped[name] = tensor
            continue
        wrapped[f"{module}.base_Linear.{part}"] = tensor
        if part == "weight":
            keys = ("tunable_weights", "row_offsets", "col_indices", "row_indices")
            for key, found in zip(keys, csr(tensor.shape, masked[module]), strict=True):
                wrapped[f"{module}.{key}"] = found
    return wrapped


# Pickles that are not what they seem.


class Attack:
    """Unpickled freely, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


@dataclass
class Call:
    """Unpickled freely, it calls what it holds."""

    function: Any
    arguments: tuple[Any, ...]

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def repacked(path: Path, out: Path, compressed: bool = False, **records: bytes) -> Path:
    """A file of torch.save with records ("data.pkl" as data_pkl) replaced, or all compressed."""
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            last = name.rpartition("/")[2].replace(".", "_")
            new.writestr(name, records.get(last, old.read(name)))
    return out


def plain_pickle(path: Path, content: Any) -> Path:
    """A bare pickle, without torch's archive."""
    path.write_bytes(pickle.dumps(content, 2))
    return path
