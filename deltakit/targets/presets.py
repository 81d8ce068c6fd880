"""Target presets: names for sets of tensors that hold for every architecture.

They stand wherever patterns for tensors are given (target, exclude, extras, allocation), and win
over a part of a name that is spelt alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import ConfigError
from deltakit.targets.roles import Role, roles

if TYPE_CHECKING:
    import torch

_KINDS = {
    "attention-qv": ("q", "v"),
    "attention-qkv": ("q", "k", "v", "qkv"),
    "attention": ("q", "k", "v", "o", "qkv"),
    "mlp": ("mlp",),
    "bias": ("bias",),
    "norm": ("norm",),
    "embeddings": ("embedding",),
}


def preset_tensors(preset: str, model: torch.nn.Module) -> dict[str, Array | None]:
    """Live name -> what a preset takes of that tensor: None for all of it.

    Of a weight that fuses query, key and value, a preset may take some output features alone: a
    boolean array with the tensor's number of axes that broadcasts to its shape. Raises ConfigError
    where that needs an order of the fused parts that is not known.
    """
    live = dict(model.named_parameters())
    found: dict[str, Array | None] = {}
    for name, role in roles(model).items():
        if role.kind == "qkv" and preset == "attention-qv":
            found[name] = _features(name, live[name].shape, role, "qv")
        elif role.linear if preset == "all-linear" else role.kind in _KINDS[preset]:
            found[name] = None
    return found


def _features(name: str, shape: tuple[int, ...], role: Role, letters: str) -> Array:
    if not role.spans:
        raise ConfigError(
            f"{name!r} holds query, key and value in one tensor, in an order that is not known for "
            "this model; use attention-qkv or name tensors by pattern"
        )
    taken = np.zeros(shape[role.output_axis], np.bool_)
    for letter in letters:
        for start, stop in role.spans[letter]:
            taken[start:stop] = True
    view = [1] * len(shape)
    view[role.output_axis] = -1
    return taken.reshape(view)
