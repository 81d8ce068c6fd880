"""Where the weights of a model are while accelerate keeps them away from its parameters.

`device_map` and `cpu_offload` leave parameters without data in the model; a hook brings the weights
in for the length of a forward pass. Those that it fetches from host memory can be changed there.
Those on disk cannot: the file is often the very checkpoint that the model was loaded from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from deltakit.errors import CoordinateError
from deltakit.parallel.shards import is_split


def resident(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that holds the weights called `name` in the model.

    `tensor` itself, unless it has no data and a hook holds it in host memory. A tensor whose
    weights are in no memory is given back as it is; `check_resident` refuses it.
    """
    if not tensor.is_meta:
        return tensor
    path, _, leaf = name.rpartition(".")
    for hook in _hooks(getattr(model.get_submodule(path), "_hf_hook", None)):
        held: Any = getattr(hook, "weights_map", None)
        key = leaf
        while hasattr(held, "prefix"):  # a view of a larger map
            held, key = held.dataset, f"{held.prefix}{key}"
        held = getattr(held, "state_dict", held)  # a loader: its part in memory
        found = held.get(key) if isinstance(held, dict) else None
        if isinstance(found, torch.Tensor):
            return found
    return tensor


def check_resident(name: str, tensor: torch.Tensor) -> None:
    """Raise CoordinateError when the weights of a live tensor are in no memory, or not all here."""
    if tensor.is_meta:
        raise CoordinateError(
            f"tensor {name!r} is on the meta device: its weights are on disk or were never loaded; "
            "load the model with a device_map that keeps it in memory, or merge into the files"
        )
    if is_split(tensor):
        raise CoordinateError(
            f"tensor {name!r} is split among processes (fully_shard); apply the delta before that, or "
            "merge it into the files that the model is loaded from"
        )


def _hooks(hook: Any) -> Iterator[Any]:
    """A hook, or all hooks of a chain of them."""
    yield from getattr(hook, "hooks", [hook])
