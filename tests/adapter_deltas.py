"""A small adapter delta, made without torch."""

from __future__ import annotations

import numpy as np

from deltakit import SparseDelta, TensorDelta
from deltakit.adapter import Adapter
from deltakit.adapters.initial import check_value, initial_values

SHAPES = {"layer.lora_A.weight": (4, 6), "layer.lora_B.weight": (5, 4)}
INITIAL = {"lora_A.weight": {"uniform": "fan-in"}, "lora_B.weight": {"constant": 0.0}}


def adapter_delta(seed: int = 7) -> SparseDelta:
    """A LoRA of rank 4 at a 5 x 6 layer, with entries in A alone."""
    initial = {
        name: initial_values(INITIAL[name.removeprefix("layer.")], name, shape, "float32", seed)
        for name, shape in SHAPES.items()
    }
    config = {"r": 4}
    at = {"layer.lora_A.weight": [1, 8, 20], "layer.lora_B.weight": []}
    return SparseDelta(
        tensors={
            name: TensorDelta(
                name=name,
                shape=shape,
                dtype="float32",
                mode="add",
                indices=np.array(at[name], np.int64),
                values=np.linspace(-1, 2, len(at[name]), dtype=np.float32),
            )
            for name, shape in SHAPES.items()
        },
        adapter=Adapter(
            kind="lora",
            config=config,
            seed=seed,
            initial=INITIAL,
            check=check_value("lora", config, initial),
        ),
    )
