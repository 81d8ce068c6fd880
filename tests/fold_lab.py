"""Adapter deltas of any shape with random entries, and what folding them must give, naively."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deltakit import SparseDelta, TensorDelta
from deltakit.adapter import Adapter
from deltakit.adapters.initial import STORED, check_value, initial_values, trained_values
from deltakit.dtypes import Array
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import identify

FAN_IN: dict[str, Any] = {"uniform": "fan-in"}
SMALL: dict[str, Any] = {"uniform": 0.05}
ZERO: dict[str, Any] = {"constant": 0.0}
ONE: dict[str, Any] = {"constant": 1.0}
RULES: dict[str, dict[str, Any]] = {
    "lora_A.weight": FAN_IN,
    "lora_B.weight": ZERO,
    "lora_B.bias": ZERO,
    "lora_embedding_A": ZERO,
    "lora_embedding_B": SMALL,
    "lora_magnitude_vector.weight": {"computed": "row-norm"},
    "lora_A": SMALL,
    "lora_B": SMALL,
    "lora_E": ZERO,
    "ia3_l": ONE,
    "hada_w1_a": FAN_IN,
    "hada_w1_b": FAN_IN,
    "hada_w2_a": FAN_IN,
    "hada_w2_b": ZERO,
    "lokr_w1": ZERO,
    "lokr_w2": FAN_IN,
    "lokr_w2_a": FAN_IN,
    "lokr_w2_b": FAN_IN,
}
LORA = {"r": 4, "lora_alpha": 6, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}

Modules = Mapping[str, Mapping[str, tuple[int, ...]]]


def adapter_on(
    base: Path | None,
    modules: Modules,
    kind: str = "lora",
    config: Mapping[str, Any] | None = None,
    *,
    seed: int = 3,
    density: float = 0.4,
    size: float = 0.5,
    stored: bool = False,
    **more: Any,
) -> SparseDelta:
    """A delta of an adapter with random entries. modules: module -> parameter -> shape. stored: the
    initial values stand among the extras, as data-derived ones do."""
    rng = np.random.default_rng(seed)
    config = {**LORA, "fan_in_fan_out": False} if config is None else dict(config)
    checkpoint = None if base is None else Checkpoint(base)
    initial, used, tensors = {}, {}, {}
    for module, parameters in modules.items():
        for parameter, shape in parameters.items():
            name = f"{module}.{parameter}"
            rule = RULES[parameter]
            if "computed" in rule:
                assert checkpoint is not None
                weight = array_of(checkpoint, f"{module}.weight")
                initial[name] = row_norms(weight, bool(config.get("fan_in_fan_out")), shape)
            else:
                initial[name] = initial_values(rule, name, shape, "float32", seed)
            if stored:
                rule = {"stored": True}
                initial[name] = rng.normal(0, 0.3, shape).astype(np.float32)
            used[parameter] = rule
            numel = initial[name].size
            at = np.flatnonzero(rng.random(numel) < density)
            tensors[name] = TensorDelta(
                name=name,
                shape=shape,
                dtype="float32",
                mode="add",
                indices=at,
                values=rng.normal(0, size, len(at)).astype(np.float32),
                order=np.arange(len(at)),
            )
    adapter = Adapter(
        kind=kind,
        config=config,
        seed=seed,
        initial=used,
        check=check_value(kind, config, initial),
    )
    extras = {STORED + name: array for name, array in initial.items()} if stored else {}
    identity = None
    if checkpoint is not None:
        names = [f"{m}.{p}" for m in modules for p in ("weight", "bias")]
        identity = identify(checkpoint, {n: None for n in names if n in checkpoint.tensors})
    delta = SparseDelta(tensors=tensors, adapter=adapter, base=identity, extras=extras)
    return replace(delta, extras={**extras, **more.pop("extras", {})}, **more)


def values_of(delta: SparseDelta, base: Path | None = None) -> dict[str, dict[str, Array]]:
    """Module -> parameter -> trained values."""

    def computed(module: str, how: str, shape: tuple[int, ...]) -> Array:
        assert base is not None and delta.adapter is not None
        weight = array_of(Checkpoint(base), f"{module}.weight")
        return row_norms(weight, bool(delta.adapter.config.get("fan_in_fan_out")), shape)

    assert delta.adapter is not None
    found: dict[str, dict[str, Array]] = {}
    for name, array in trained_values(delta, computed).items():
        module, parameter = delta.adapter.split(name)
        found.setdefault(module, {})[parameter] = array
    return found


def row_norms(weight: Array, transposed: bool, shape: tuple[int, ...]) -> Array:
    """The norm of each output's weights: squares in float64, one input after the other."""
    matrix = weight.reshape(len(weight), -1).astype(np.float32).astype(np.float64)
    total = np.zeros(matrix.shape[1] if transposed else len(matrix), np.float64)
    for squares in matrix * matrix if transposed else (matrix * matrix).T:
        total = total + squares
    return np.asarray(np.sqrt(total).astype(np.float32).reshape(shape))


def array_of(checkpoint: Checkpoint, name: str) -> Array:
    """A tensor of a checkpoint, in its own dtype and shape."""
    info = checkpoint.info(name)
    return checkpoint.read(name).view(info.kind.numpy).reshape(info.shape)


def naive_product(left: Array, right: Array) -> Array:
    """left [n, r] @ right [r, m] in float32, whole outer products summed in the order of ranks."""
    total = np.zeros((len(left), right.shape[1]), np.float32)
    for rank in range(len(right)):
        total = total + left[:, rank, None] * right[rank][None, :]
    return total


def naive_merge(base: Array, terms: list[tuple[float, Array]]) -> Array:
    """round(float32(base) + (0 + w1 * v1 + w2 * v2 + ...)) where any v is not 0, else the base."""
    total, moved = np.zeros(base.shape, np.float32), np.zeros(base.shape, bool)
    for weight, change in terms:
        total = total + np.float32(weight) * change
        moved |= change != 0
    with np.errstate(invalid="ignore"):
        merged = (base.astype(np.float32) + total).astype(base.dtype)
    return np.where(moved, merged, base)
