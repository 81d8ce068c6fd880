"""Random values that an adapter of peft holds and does not train, made of deltakit's own seed.

peft draws them from torch's generator, whose values no specification fixes. Here they come from the
generator of a delta's seed, so that the file alone gives their bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import numpy as np
import torch

from deltakit.adapters.initial import initial_values
from deltakit.dtypes import Array
from deltakit.formats.seeded import seeded_support


def freeze_vera(
    layers: Mapping[str, Any], name: str, seed: int, modules: Mapping[str, str]
) -> dict[str, Array]:
    """VeRA's shared matrices, uniform within sqrt(6 / fan in) (Kopiczko et al., 2023, section 3.3)."""
    frozen = {}
    for layer in layers.values():
        for what in ("vera_A", "vera_B"):
            matrix = getattr(layer, what)[name]
            shape = tuple(matrix.shape)
            rule = {"uniform": sqrt(6 / shape[1])}
            frozen[what] = initial_values(rule, what, shape, "float32", seed)
            matrix.copy_(torch.from_numpy(frozen[what]))
        break  # all layers hold the same two
    return frozen


def freeze_fourierft(
    layers: Mapping[str, Any], name: str, seed: int, modules: Mapping[str, str]
) -> dict[str, Array]:
    """The places of FourierFT's frequencies, int64 [2, n] (Gao et al., 2024, section 3.1)."""
    frozen = {}
    for module, layer in layers.items():
        shape = (layer.out_features, layer.in_features)
        count = layer.fourierft_n_frequency[name]
        called = f"{modules[module]}.indices"
        flat = seeded_support(seed, called, shape[0] * shape[1], count)
        frozen[called] = np.stack(np.divmod(flat, shape[1]))
        layer.indices[name] = torch.from_numpy(frozen[called]).to(layer.indices[name].device)
    return frozen


FREEZE = {"VERA": freeze_vera, "FOURIERFT": freeze_fourierft}
